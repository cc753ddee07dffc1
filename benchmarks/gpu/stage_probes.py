"""The probes of probes.py, some at a time, each in a process and under a limit of its own."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import processes
from records import Record
from stage import Given

LIMIT = 75.0
"""Seconds of one probe: a first import, a CUDA context, a compile."""

NAMES = (
    "no_step_waits", "compiled_inductor", "evaluators", "fused_optimizers", "compiled_eager",
    "deterministic", "out_of_memory", "failed_compile", "precisions",
)  # fmt: skip
"""The longest first."""


def measure(given: Given, record: Record) -> None:
    script = Path(__file__).with_name("probes.py")

    def one(name: str) -> dict[str, Any]:
        if given.left < 5:
            return {"status": "not reached"}
        command = processes.python(script, name, *given.arguments())
        done = processes.run(command, min(LIMIT, given.left - 2))
        found: dict[str, Any] = {"status": done.status, "seconds": done.seconds}
        if done.passed:
            return found | {"found": json.loads(done.output.splitlines()[-1])}
        return found | {"output": done.output[-2000:]}

    at_once = max(1, min(4, (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(at_once) as pool:
        for name, found in zip(NAMES, pool.map(one, NAMES), strict=True):
            record.add(**{name: found})
    failed = [name for name in NAMES if record.content[name]["status"] != "passed"]
    if failed:
        raise RuntimeError(f"probes that did not pass: {', '.join(failed)}")
