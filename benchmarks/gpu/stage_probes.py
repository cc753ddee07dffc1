"""Runs the probes of probes.py, each in its own process with a time limit, several at a time."""

import json
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import processes
from records import Record
from stage import Given

LIMIT = 75.0
"""Seconds of one probe: a first import, a CUDA context, a compile."""

LONG = {"no_step_waits": 130.0, "evaluators": 130.0}

NAMES = (
    "no_step_waits", "compiled_inductor", "evaluators", "fused_optimizers", "compiled_eager",
    "deterministic", "out_of_memory", "failed_compile", "precisions",
)  # fmt: skip
"""The longest first."""


def probed(given: Given, name: str) -> dict[str, Any]:
    """One probe's status and what it found."""
    if given.left < 5:
        return {"status": "not reached"}
    result = given.work / f"probe-{name}.json"
    result.unlink(missing_ok=True)
    script = Path(__file__).with_name("probes.py")
    command = processes.python(script, name, *given.arguments(), "--result", result)
    done = processes.run(command, min(LONG.get(name, LIMIT), given.left - 2))
    figures: dict[str, Any] = {"status": done.status, "seconds": done.seconds}
    if result.exists():
        figures["found"] = json.loads(result.read_text())
    return figures if done.passed else figures | {"output": done.output[-2000:]}


def measure(given: Given, record: Record) -> None:
    at_once = max(1, min(4, (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(at_once) as pool:
        started = {pool.submit(probed, given, name): name for name in NAMES}
        for each in as_completed(started):
            record.add(**{started[each]: each.result()})
    failed = [name for name in NAMES if record.content[name]["status"] != "passed"]
    if failed:
        reasons = "\n".join(f"  {name}: {_reason(record.content[name])}" for name in failed)
        raise RuntimeError(f"probes that did not pass:\n{reasons}")


def _reason(outcome: dict[str, Any]) -> str:
    """The last lines of what a failed probe printed, or its status."""
    return " | ".join(outcome.get("output", "").strip().splitlines()[-3:]) or outcome["status"]
