"""`make acceptance`: the table of digits, with the same network, epochs and seeds in every row."""

import argparse
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tools import keep, trained
from torch import Tensor

from jemkit.config.eval_settings import Settings
from jemkit.config.registry import installed
from jemkit.evaluation.evaluate import judge
from jemkit.evaluation.subjects import subject_at

BY_PGD = ["run.select=pgd10"]
"""Every row's epoch is selected by the same accuracy."""
ROWS = {
    "classifier x pgdat": ("classifier", "pgdat", []),
    "classifier x trades": ("classifier", "trades", []),
    "jempp x jem": ("jempp", "jem", BY_PGD),
    "sadajem x jem": ("sadajem", "jem", BY_PGD),
    "jempp x ebjdat": ("jempp", "ebjdat", []),
    "sadajem x ebjdat": ("sadajem", "ebjdat", []),
    "sadajem x ebjdat, inner joint": ("sadajem", "ebjdat", ["objective.inner=joint"]),
}
PROTOCOL = {
    "data": "digits, 500 test images",
    "seeds": "0, 1, ... ; means over them",
    "attack": "PGD-20, L-inf, 25.5/255, steps of 6.375/255, one uniform start in the ball",
    "gaps": "of |E(x~) - E(x)| under that attack; relative to the standard deviation of E(x)",
    "selection": "the epoch with the best PGD-10 accuracy on 130 validation images",
    "differences": "PGD-20 again with the same noise for all rows; paired bootstrap over both",
    "epochs": 80,
}
RIVALS = ("classifier x pgdat", "classifier x trades")


def arguments(row: str, seed: int) -> list[str]:
    backbone, objective, settings = ROWS[row]
    named = ["--backbone", backbone, "--objective", objective, "--dataset", "digits"]
    return [*named, "--seed", str(seed), *(f"--set={setting}" for setting in settings)]


def survivors(out: Path) -> Tensor:
    """Which test images the run's best model gets right under PGD-20, the same noise for all."""
    subject = subject_at(out, installed(), torch.device("cpu"))
    settings = Settings(
        attacks=("pgd",), only=("robustness",), options={"robustness": {"indicators": False}}
    )
    return judge(subject._replace(folder=None), settings, installed()).rows["pgd20"]


def bootstrap(ours: np.ndarray, theirs: np.ndarray, draws: int = 10_000) -> list[float]:
    """The 95 % interval of the difference of two accuracies [seeds, images], both resampled."""
    rng = np.random.default_rng(0)
    difference = ours.astype(float) - theirs.astype(float)
    seeds, images = difference.shape
    means = [
        difference[rng.integers(seeds, size=seeds)][:, rng.integers(images, size=images)].mean()
        for _ in range(draws)
    ]
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def main(folder: Path, seeds: int, jobs: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(row, seed) for row in ROWS for seed in range(seeds)]
    places = {(r, s): folder / f"{'-'.join(re.findall(r'[a-z]+', r))}-{s}" for r, s in runs}

    def one(run: tuple[str, int]) -> dict[str, Any]:
        return trained(arguments(*run), places[run])

    with ThreadPoolExecutor(jobs) as pool:
        by_run = dict(zip(runs, pool.map(one, runs), strict=True))
    torch.set_num_threads(1)
    alive = {
        row: np.stack([survivors(places[row, seed]).numpy() for seed in range(seeds)])
        for row in ROWS
    }
    names = ("clean_accuracy", "pgd_accuracy", "energy_gap_mean", "energy_gap_variance")
    names += ("energy_gap_relative", "seconds")
    table = {}
    for row in ROWS:
        table[row] = {n: statistics.mean(by_run[row, s][n] for s in range(seeds)) for n in names}
        table[row]["pgd_of_each_seed"] = [by_run[row, s]["pgd_accuracy"] for s in range(seeds)]
    differences = {
        f"{row} less {rival}": {
            "mean": float(alive[row].mean() - alive[rival].mean()),
            "interval95": bootstrap(alive[row], alive[rival]),
        }
        for row in ROWS
        if "ebjdat" in row
        for rival in RIVALS
    }
    keep(
        "acceptance",
        {"protocol": PROTOCOL, "table": table, "pgd20_differences": differences},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/acceptance"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    main(given.folder, given.seeds, given.jobs)
