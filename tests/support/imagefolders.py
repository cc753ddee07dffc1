"""Small folders of images, for tests of how they are read."""

from pathlib import Path

import numpy as np
from PIL import Image


def image(path: Path, seed: int = 0, *, size: int = 8, mode: str = "L") -> Path:
    """Save an image that depends on its seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size, size) if mode == "L" else (size, size, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".dib": "BMP"}.get(path.suffix.lower())
    Image.fromarray(pixels).save(path, format=kind)
    return path


def split_folder(
    root: Path,
    splits: tuple[str, ...] = ("train", "test"),
    classes: tuple[str, ...] = ("cat", "dog"),
    n: int = 2,
) -> Path:
    """root/SPLIT/CLASS/0..n.png, each of its own pixels; "" is no split."""
    seed = 0
    for split in splits:
        for name in classes:
            for i in range(n):
                seed += 1
                image(root / split / name / f"{i}.png", seed)
    return root
