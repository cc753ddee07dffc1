"""Shared code of the benchmarks: the machine's kind, ratios within one run, results as JSON."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jemkit.runtime.run_dir import versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The kind of machine that a figure was measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":")[1] for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0].strip() if names else cpu
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "threads": torch.get_num_threads()}


def keep(name: str, figures: Any) -> None:
    """Write benchmarks/results/NAME.json and print it."""
    RESULTS.mkdir(exist_ok=True)
    record = {"machine": machine(), "versions": versions(), "figures": figures}
    text = json.dumps(record, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(name, json.dumps(figures, indent=1))


def in_turn(
    first: Callable[[], Any], second: Callable[[], Any], rounds: int = 15
) -> dict[str, Any]:
    """Two functions timed in turn: medians in milliseconds, and the median ratio pair by pair."""
    first(), second()
    pairs = [(_seconds(first), _seconds(second)) for _ in range(rounds)]
    return {
        "first_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "second_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def trained(arguments: list[str], out: Path) -> dict[str, Any]:
    """The JSON line of `jemkit train ARGUMENTS --out OUT`; a run that is there is not run again."""
    output = out.with_suffix(".json")
    if not output.exists():
        jemkit = str(Path(sys.executable).with_name("jemkit"))
        command = [jemkit, "train", *arguments, "--out", str(out), "--json", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        output.write_text(done.stdout.splitlines()[-1])
    line = json.loads(output.read_text())
    return {name: value for name, value in line.items() if name != "run"}


def _seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
