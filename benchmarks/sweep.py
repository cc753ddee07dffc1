"""The settings from which EB-JDAT's recipe for digits was chosen, with one seed each."""

import argparse
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools import keep, trained

PAPER = "objective.outer=align objective.w2=0.05 objective.w3=0.45 objective.w_clean=0.45"
JOINT = "objective.inner=joint"
ALIGN = PAPER.replace("w2=0.05", "w2=0.4")
SETTINGS = {
    "the recipe": "",
    "inner joint (Eq. 12)": JOINT,
    "the paper's weights, inner joint": f"{PAPER} {JOINT}",
    "the paper's weights, inner ce": PAPER,
    "align, w2 0.4, inner joint": f"{ALIGN} {JOINT}",
    "align, w2 0.4, inner ce": ALIGN,
    "contrastive, w2 0.4, inner joint": f"{ALIGN} objective.outer=contrastive {JOINT}",
    "squared, w2 10": "objective.w2=10.0",
    "ten steps of x~": "objective.adv_steps=10",
}


def main(folder: Path, jobs: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def one(name: str) -> dict[str, Any]:
        given = [f"--set={part}" for part in SETTINGS[name].split()]
        try:
            return trained(given, folder / "-".join(re.findall(r"[a-z0-9]+", name)))
        except subprocess.CalledProcessError as error:
            if error.returncode != 4:
                raise
            return {"diverged": error.stderr.strip()}

    with ThreadPoolExecutor(jobs) as pool:
        keep("sweep", dict(zip(SETTINGS, pool.map(one, SETTINGS), strict=True)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    main(given.folder, given.jobs)
