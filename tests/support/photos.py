"""Folders of small image files, and short runs on them."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from jemkit import installed, resolve
from jemkit.config.recipe import Resolved

REGISTRY = installed(third_party=False)
CLASSES = ("cat", "dog", "fox")
SIDE = 8


def photo(path: Path, label: int, seed: int) -> None:
    """One picture of a class: its own grey, with noise."""
    noise = torch.randint(0, 30, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((40 + 60 * label + noise).to(torch.uint8).numpy()).save(path)


def photos(
    root: Path, *, classes: Iterable[str] = CLASSES, n: int = 10, splits: Iterable[str] = ("",)
) -> Path:
    """n pictures of each class, no two of them alike."""
    for k, split in enumerate(splits):
        for label, name in enumerate(classes):
            for i in range(n):
                photo(root / split / name / f"{i:03d}.png", label, 10_000 * k + 100 * label + i)
    return root


def copied(root: Path, to: Path) -> Path:
    shutil.copytree(root, to)
    return to


def photo_recipe(root: Path, *overrides: str, **named: Any) -> Resolved:
    """A classifier on a folder: three epochs of a few steps."""
    return resolve(
        REGISTRY,
        config={
            "data": {"use": "folder", "dir": str(root)},
            "backbone": {"use": "classifier", "network": {"use": "smallcnn", "channels": 2}},
            "objective": {"use": "ce"},
            "optimizer": {"use": "sgd", "lr": 0.01},
            "run": {"epochs": 3, "batch_size": 8, "device": "cpu", "eval_images": 3},
        },
        overrides=overrides,
        named=named,
    )
