"""An exported model's folder: its files, and the checks before anything else reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jemkit.config.recipe import Recipe
from jemkit.data import Task
from jemkit.errors import DataError
from jemkit.runtime.files import file_hash, read_json
from jemkit.splits import Splits

FORMAT = 1
"""File names in an exported model's folder."""

CONFIG, CARD, WEIGHTS = "config.json", "README.md", "model.safetensors"
FIGURES, SAMPLES = "figures.json", "samples.png"


def is_exported(folder: Path) -> bool:
    """Whether a folder is an exported or imported model, and not a run."""
    return (folder / CONFIG).exists() and (folder / WEIGHTS).exists()


def verify(folder: Path) -> str:
    """Check an exported model's files against its config.json; returns the SHA-256 of its
    weights."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        stored_format = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise DataError(f"{folder} has export format {stored_format!r}; this jemkit reads {FORMAT}")
    hashes = config.get("sha256")
    wanted = hashes if isinstance(hashes, dict) else {}
    for name in dict.fromkeys([WEIGHTS, *map(str, wanted)]):
        path, sha = folder / name, wanted.get(name)
        if Path(name).name != name or not path.is_file() or file_hash(path) != sha:
            raise DataError(f"{path} is missing or damaged: its SHA-256 is not {sha}")
    return str(wanted[WEIGHTS])


MOST_PX = 2**16
"""Limits for the side of an image and the number of channels."""


def task_table(task: Task) -> dict[str, Any]:
    """What the parts must know of the data, so that a model can be built without it."""
    return {
        "shape": list(task.shape),
        "n_classes": task.n_classes,
        "radius_px": task.radius_px,
        "n_train": task.n_train,
        "total_steps": task.total_steps,
        "hash": task.hash,
    }


def saved_task(config: Mapping[str, Any], recipe: Recipe, splits: Splits) -> Task | None:
    """The task in config.json; None if it has none, as in 0.1.0."""
    table = config.get("task")
    if table is None:
        return None
    try:
        shape = tuple(table["shape"])
        if not all(type(size) is int and 0 < size <= MOST_PX for size in shape):
            raise ValueError
        n_classes, n_train = int(table["n_classes"]), int(table["n_train"])
        steps = int(table["total_steps"])
        radius, sha = float(table["radius_px"]), str(table["hash"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise DataError(f"{CONFIG}: [task] is damaged; export or import the model again") from None
    if len(shape) != 3 or min(shape) < 1 or n_classes < 1 or not radius >= 0:
        raise DataError(f"{CONFIG}: [task] names images {list(shape)} of {n_classes} classes")
    return Task(
        shape=(shape[0], shape[1], shape[2]),
        radius_px=radius,
        images=splits.images,
        hash=sha,
        augmentation=recipe.data.augmentation,
        n_classes=n_classes,
        n_train=n_train,
        total_steps=steps,
    )
