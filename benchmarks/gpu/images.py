"""CIFAR-10's batch files as lossless WebP and back, byte for byte; some of them as PNG files.

A batch file contains the pixels of 10,000 images in one block, 30 MB, and little else. `squeeze`
stores this block as one image, a grid, and the remaining bytes compressed: 17 MB per file.
`restore` recreates the file and checks its md5. Nothing is unpickled here.
"""

import hashlib
import json
import lzma
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = "cifar-10-batches-py"
BATCHES = ("test_batch", *(f"data_batch_{i}" for i in range(1, 6)))
"""The test images come first: a kit without all files still has them."""

IMAGE = 3 * 32 * 32  # bytes
BLOCK = b"T"  # pickle's opcode of a long string, followed by its length in four bytes
NAMES = "batches.meta"


def squeeze(source: Path, target: Path) -> None:
    """Write TARGET/NAME.webp and TARGET/NAME.xz for the batch file `source`."""
    content = source.read_bytes()
    start, count = _block(content, source)
    block = np.frombuffer(content, np.uint8, count * IMAGE, start)
    target.mkdir(parents=True, exist_ok=True)
    _grid(block).save(target / f"{source.name}.webp", lossless=True, quality=100, method=4)
    around = {
        "images": count,
        "md5": hashlib.md5(content).hexdigest(),
        "before": content[:start].hex(),
        "after": content[start + count * IMAGE :].hex(),
    }
    (target / f"{source.name}.xz").write_bytes(lzma.compress(json.dumps(around).encode()))


def restore(name: str, source: Path, target: Path) -> Path:
    """Write TARGET/NAME, the batch file that `squeeze` stored in `source`; OSError if it differs.

    The file appears whole or not at all.
    """
    around = json.loads(lzma.decompress((source / f"{name}.xz").read_bytes()))
    block = _pixels(source / f"{name}.webp", around["images"]).tobytes()
    content = bytes.fromhex(around["before"]) + block + bytes.fromhex(around["after"])
    if hashlib.md5(content).hexdigest() != around["md5"]:
        raise OSError(
            f"{source / name}.webp does not give {name} back: its md5 differs; pack again"
        )
    target.mkdir(parents=True, exist_ok=True)
    written = target / f"{name}.part"
    written.write_bytes(content)
    written.replace(target / name)
    return target / name


def export_png(name: str, source: Path, target: Path) -> int:
    """Write the images of one stored batch as TARGET/CLASS/NAME-INDEX.png; how many there are."""
    around = json.loads(lzma.decompress((source / f"{name}.xz").read_bytes()))
    pixels = _pixels(source / f"{name}.webp", around["images"])
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for index, (image, label) in enumerate(zip(images, _labels(around), strict=True)):
        folder = target / f"class-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{name}-{index:05d}.png", compress_level=1)
    return len(images)


def _block(content: bytes, source: Path) -> tuple[int, int]:
    """Where the pixels begin, and of how many images they are."""
    at = content.find(BLOCK)
    while at >= 0:
        size = int.from_bytes(content[at + 1 : at + 5], "little")
        if size and size % IMAGE == 0 and at + 5 + size <= len(content):
            return at + 5, size // IMAGE
        at = content.find(BLOCK, at + 1)
    raise ValueError(
        f"{source} holds no block of 32 x 32 images; expected is a CIFAR-10 batch file"
    )


def _grid(block: NDArray[np.uint8]) -> Image.Image:
    """[N * 3072] bytes as a square picture of N images, the last row filled up with black."""
    count = len(block) // IMAGE
    side = math.isqrt(count - 1) + 1
    cells = np.zeros((side * side, 3, 32, 32), np.uint8)
    cells[:count] = block.reshape(count, 3, 32, 32)
    rows = cells.reshape(side, side, 3, 32, 32).transpose(0, 3, 1, 4, 2)
    return Image.fromarray(rows.reshape(side * 32, side * 32, 3))


def _pixels(path: Path, count: int) -> NDArray[np.uint8]:
    """[count, 3, 32, 32] from the picture of a grid."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    side = picture.shape[0] // 32
    cells = picture.reshape(side, 32, side, 32, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(cells.reshape(side * side, 3, 32, 32)[:count])


def _labels(around: dict[str, str]) -> list[int]:
    """Labels of a batch file, read as opcodes: `labels`, then small integers K in a list."""
    before, after = bytes.fromhex(around["before"]), bytes.fromhex(around["after"])
    content = before if b"labels" in before else after
    labels: list[int] = []
    at = content.index(b"labels")
    while len(labels) < int(around["images"]):
        at = content.index(b"K", at)
        labels.append(content[at + 1])
        at += 2
    return labels
