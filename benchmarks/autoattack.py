"""Compares the time of AutoAttack in jemkit and in pyautoattack, run alternately.

Besides wall-clock time it measures processor time, which depends less on other programs on the
machine.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tools import keep

from jemkit import installed
from jemkit.attacks.base import Threat
from jemkit.evaluation.subjects import EvalTarget, subject_at
from jemkit.metrics.attack_runner import attacked
from jemkit.metrics.evaluator import Context
from jemkit.runtime.modes import eval_mode, frozen

TARGET = 1.03
SEED, BATCH = 0, 250


def ours(subject: EvalTarget, n: int) -> torch.Tensor:
    """The attack `aa` through jemkit's driver, with its half-done work on disk."""
    device = next(subject.model.parameters()).device
    data = subject.test.take(torch.arange(n))
    threat = Threat("Linf", subject.radius_px)
    with tempfile.TemporaryDirectory() as folder, frozen(subject.model), eval_mode(subject.model):
        ctx = Context(
            torch.Generator(device), threat, seed=SEED, batch_size=BATCH, work=Path(folder)
        )
        return attacked(subject.model, installed()["attack"]["aa"](), data, ctx, "aa").right


def theirs(subject: EvalTarget, n: int) -> torch.Tensor:
    """pyautoattack's own driver on the same model."""
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").addHandler(logging.NullHandler())
    device = next(subject.model.parameters()).device
    x, y = subject.test.unit()[:n], subject.test.y[:n]
    eps = subject.radius_px / 255
    with frozen(subject.model), eval_mode(subject.model), torch.random.fork_rng():
        driver = AutoAttack(subject.model, norm="Linf", eps=eps, seed=SEED, device=device)
        _, y_adv = driver.run_standard_evaluation(x, y, batch_size=BATCH)
        return y_adv == y


def compared(subject: EvalTarget, n: int, rounds: int) -> dict[str, Any]:
    """Seconds of both, who is first by turns, and their ratio."""
    pair = {"jemkit": ours, "pyautoattack": theirs}
    clock: dict[str, list[float]] = {name: [] for name in pair}
    processor: dict[str, list[float]] = {name: [] for name in pair}
    right: dict[str, torch.Tensor] = {}
    for turn in range(rounds):
        for name in pair if turn % 2 == 0 else reversed(pair):
            began = time.perf_counter(), time.process_time()
            right[name] = pair[name](subject, n)
            clock[name].append(round(time.perf_counter() - began[0], 3))
            processor[name].append(round(time.process_time() - began[1], 3))
            print(name, clock[name][-1], "s on the clock,", processor[name][-1], "s of work")
    return {
        "images": n,
        "clock_s": clock,
        "processor_s": processor,
        "ratio": round(sum(clock["jemkit"]) / sum(clock["pyautoattack"]), 4),
        "processor_ratio": round(sum(processor["jemkit"]) / sum(processor["pyautoattack"]), 4),
        "target": TARGET,
        "accuracy": float(right["jemkit"].float().mean()),
        "equal": bool(torch.equal(right["jemkit"], right["pyautoattack"])),
    }


def main(run: Path, n: int | None, rounds: int) -> None:
    subject = subject_at(run, installed(), torch.device("cpu"))
    whole = len(subject.test.y)
    for warm in (ours, theirs):  # imports and first allocations are nobody's
        warm(subject, 2)
    comparison = compared(subject, min(n or whole, whole), rounds)
    if comparison["images"] == whole:
        keep("autoattack", comparison)
    else:
        print(json.dumps(comparison, indent=1))
    print(
        f"jemkit takes {comparison['ratio']:.3f} of pyautoattack's time; expected at most {TARGET}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a trained run, such as one on digits")
    parser.add_argument("--images", type=int, help="the first ones; a record needs all")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    main(given.run, given.images, given.rounds)
