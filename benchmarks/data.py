"""The share of data loading in a training step: batches of CIFAR-10 against whole steps.

    python benchmarks/data.py --data-dir DIR

A step of plain cross-entropy is the cheapest, so its share is the largest.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tools import keep

from jemkit import resolve
from jemkit.config.registry import installed
from jemkit.runtime.precision import numerics
from jemkit.step import train_step
from jemkit.training.build import build_run
from jemkit.updaters import Guard

PAIRS = (("classifier", "ce"), ("sadajem", "ebjdat"))


def seconds(call: Callable[[], Any], times: int, cuda: bool) -> float:
    """The median of so many calls, one after another, after one to warm up."""
    durations = []
    for _ in range(times + 1):
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - began)
    return statistics.median(durations[1:])


def share(given: argparse.Namespace, backbone: str, objective: str) -> dict[str, float]:
    """Milliseconds of a batch and of a step, and the first over both."""
    recipe = resolve(
        installed(),
        config={
            "data": {"use": "cifar10", "dir": str(given.data_dir)},
            "backbone": {"use": backbone, "network": {"use": given.network}},
            "objective": {"use": objective},
            "run": {"batch_size": given.batch, "device": given.device},
        },
    ).recipe
    parts, guard = build_run(recipe), Guard()
    cuda = parts.device.type == "cuda"
    with numerics():
        batch = parts.loader.batch()
        data = seconds(parts.loader.batch, 200, cuda)
        step = seconds(
            lambda: train_step(
                parts.backbone, parts.objective, parts.updater, batch, parts.rng, guard
            ),
            given.rounds,
            cuda,
        )
    return {"batch_ms": 1e3 * data, "step_ms": 1e3 * step, "share": data / (data + step)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--network", default="wrn-16-2")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    keep("data", {f"{b} x {o}": share(given, b, o) for b, o in PAIRS})
