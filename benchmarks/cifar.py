"""A short CIFAR-10 run on two cores: 5,000 images, WRN-10-2, three epochs, SADA-JEM x EB-JDAT."""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch
from tools import keep, trained

from jemkit.config.eval_settings import Settings
from jemkit.config.registry import installed
from jemkit.evaluation.evaluate import judge
from jemkit.evaluation.subjects import subject_at

SETTINGS = "--dataset cifar10 --network wrn-10-2 --epochs 3 --set run.max_train=5000"
SETTINGS += " --set schedule.decay=constant --set run.test_images=10000"
ROBUST = 1000
"""Test images that PGD-20 attacks at the last step; the run's own table has all of them."""


def last(out: Path) -> dict[str, Any]:
    """The model of the last step, on the test split."""
    subject = subject_at(out, installed(), torch.device("cpu"), which="last")._replace(folder=None)
    clean = judge(subject, Settings(only=("accuracy",)), installed())
    settings = Settings(
        attacks=("pgd",), only=("robustness", "energies"), max_images=ROBUST, selection="first"
    )
    robust = judge(subject, settings, installed())
    figures = [clean.figure("clean"), *(f for f in robust.figures if f.name != "clean")]
    return {f.name: [f.value, f.low, f.high, f.n] for f in figures}


def main(data: Path, out: Path) -> None:
    best = trained([*SETTINGS.split(), "--data-dir", str(data)], out)
    with (out / "metrics.csv").open() as file:
        gaps = [abs(float(row["gap x+ x-"])) for row in csv.DictReader(file)]
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    names = ("epoch", "accuracy", "pgd10")
    epochs = [{k: e[k] for k in names} for e in events if e["event"] == "epoch"]
    figures = {
        "command": f"jemkit train {SETTINGS}",
        "largest_gap_of_x_pos_and_x_neg": max(gaps),
        "validation": epochs,
        "last_step_on_test": last(out),
        "best_epoch_by_pgd10_on_test": best,
    }
    keep("cifar10", figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    given = parser.parse_args()
    main(given.data_dir, given.out)
