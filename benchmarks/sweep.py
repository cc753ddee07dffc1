"""What the digits recipe of EB-JDAT was chosen from: one seed of the main job for each setting."""

import argparse
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools import keep, trained

SETTINGS = (
    "objective.w2=0.05",
    "objective.w2=0.2",
    "objective.w2=0.4",
    "objective.w2=0.05 objective.inner=ce",
    "objective.w2=0.2 objective.inner=ce",
    "objective.w2=0.4 objective.inner=ce",
    "objective.w2=0.4 objective.adv_steps=10",
    "objective.w2=0.4 objective.outer=abs",
    "objective.w2=2.0 objective.outer=squared",
    "objective.w2=0.4 objective.outer=contrastive",
    "objective.w2=0.4 objective.direction=lower",
    "objective.w2=0.4 objective.w3=0.8 objective.w_clean=0.1",
)


def main(folder: Path, jobs: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def one(setting: str) -> dict[str, Any]:
        given = [f"--set={part}" for part in setting.split()]
        return trained(given, folder / "-".join(re.findall(r"[a-z0-9]+", setting)))

    with ThreadPoolExecutor(jobs) as pool:
        keep("sweep", dict(zip(SETTINGS, pool.map(one, SETTINGS), strict=True)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    main(given.folder, given.jobs)
