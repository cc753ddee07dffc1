"""Random pixels, and a folder of them sorted by class."""

from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def sorted_folder(
    root: Path, *, n: int = 2, shape: tuple[int, ...] = (8, 8), seed: int = 0
) -> Path:
    """root/{train,test}/{cat,dog}/0..n.png"""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(n):
                seed += 1
                put(root / split / name / f"{i}.png", noise(seed, *shape))
    return root
