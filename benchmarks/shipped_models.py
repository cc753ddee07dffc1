"""Writes models of a study into examples/models, for readers who want to evaluate without training.

    python benchmarks/shipped_models.py runs/cifar10-small pgdat=pgd-at-0-59880c76 ...

`:last` after the name of a run ships its last weights instead of the best.

A model has config.json, model.safetensors, a card and its figures. The Gaussians of the training
images and the hashes of single images, which are larger than the weights, are left out.
"""

import sys
from pathlib import Path
from typing import Literal

from jemkit.evaluation.export import export
from jemkit.runtime.files import read_json, write_json
from jemkit.training.pinned import DETAILS

MODELS = Path(__file__).parents[1] / "examples" / "models"


def ship(run: Path, name: str, which: Literal["best", "last"]) -> Path:
    """The model of a run's checkpoint; its data are looked for in `data/`."""
    out = MODELS / name
    folder = export(run, out=out, which=which, moments=False, license="apache-2.0").folder
    (folder / DETAILS).unlink(missing_ok=True)
    config = read_json(folder / "config.json")
    config["data"].pop("details", None)
    config["recipe"]["data"]["dir"] = "data"
    write_json(folder / "config.json", config)
    return folder


if __name__ == "__main__":
    study, *named = sys.argv[1:]
    for pair in named:
        name, _, run = pair.partition("=")
        run, _, which = run.partition(":")
        print(ship(Path(study) / run, name, "last" if which == "last" else "best"))
