"""Image files to pixels, as an image viewer displays them."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from jemkit import DataError
from jemkit.options import SIZES
from jemkit.runtime.opening import opened as regular_file
from jemkit_plugins.folder.layout import shown

FORMATS = (
    "PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "TIFF", "WEBP", "AVIF", "PPM", "JPEG2000", "TGA",
    "PCX",
)  # fmt: skip
"""Formats that are decoded, whatever the extension; none of them starts another program."""

SIXTEEN = 65535
"""White in 16-bit greyscale."""


class Survey(NamedTuple):
    """The contents of all images' headers."""

    grey: bool  # all of them
    remarks: list[str]  # how special images are read, as text


def survey(paths: Iterable[str], size: int | None) -> Survey:
    """Read every header; images that do not fit together are rejected."""
    grey, first, remarks = True, ("", (0, 0)), Counter[str]()
    for path in paths:
        with opened(path) as image:
            mode, px = image.mode, image.size
            frames = image.format != "MPO" and getattr(image, "is_animated", False)
            clear = _transparent(image)
        first = first if first[0] else (path, px)
        if size is None:
            _check_size(path, px, first)
        grey = grey and mode.startswith(("L", "F", "I")) and mode not in ("LA", "La", "LAB")
        remarks["with several frames, of which the first is read"] += bool(frames)
        remarks["with transparency, blended with white"] += clear
    return Survey(grey, [f"{n} {remark}" for remark, n in remarks.items() if n])


def _check_size(path: str, px: tuple[int, int], first: tuple[str, tuple[int, int]]) -> None:
    if px != first[1] or px[0] != px[1]:
        raise DataError(
            f"{shown(path)} is {px[0]} x {px[1]} px, {shown(first[0])} is {first[1][0]} x "
            f"{first[1][1]}; expected squares of one size: --set data.size=32 resizes all to 32 "
            f"x 32"
        )
    if not SIZES[0] <= px[0] <= SIZES[1]:
        raise DataError(
            f"{shown(path)} is {px[0]} x {px[1]} px; jemkit's networks take {SIZES[0]} to "
            f"{SIZES[1]} px: --set data.size={SIZES[0] if px[0] < SIZES[0] else SIZES[1]} "
            f"resizes them"
        )


def pixels(path: str, *, grey: bool, size: int | None) -> Tensor:
    """One image, [C, H, W], uint8 or float32 in [0, 1]: EXIF applied, blended with white."""
    with opened(path) as raw:
        image = ImageOps.exif_transpose(raw)
        image = _on_white(image) if _transparent(image) else image
        image = _unit(image, path) if image.mode[0] in "FI" else image.convert(_plain(grey))
    if size is not None:
        image = _centre(image).resize((size, size), Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.array(image))
    x = x.permute(2, 0, 1) if x.ndim == 3 else x.unsqueeze(0)
    return (x.clamp(0, 1) if image.mode == "F" else x).expand(1 if grey else 3, -1, -1)


def _plain(grey: bool) -> str:
    return "L" if grey else "RGB"


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _on_white(image: Image.Image) -> Image.Image:
    """The image blended with white, so that invisible colours are not part of the data."""
    if image.mode[0] == "I":  # one grey value means transparent
        clear = np.asarray(image) == image.info["transparency"]
        return Image.fromarray(np.where(clear, SIXTEEN, np.asarray(image)).astype(np.uint16))
    layers = image.convert("RGBA")
    page = Image.new("RGBA", layers.size, "white")
    return Image.alpha_composite(page, layers).convert("RGB")


def _unit(image: Image.Image, path: str) -> Image.Image:
    """Float pixels unchanged, 16-bit greyscale divided by its maximum; both in [0, 1]."""
    values = np.asarray(image, dtype=np.float32)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # NaN fails both
            raise DataError(f"{shown(path)}: float pixels outside [0, 1], NaN or inf")
        return image
    if image.mode == "I" and image.format not in (None, "PPM", "PNG"):
        raise DataError(
            f"{shown(path)}: 32-bit pixels, whose range is unknown; expected 8 or 16 bits, or "
            f"floats in [0, 1]"
        )
    if not (values.min() >= 0 and values.max() <= SIXTEEN):
        raise DataError(f"{shown(path)}: grey values outside 0..{SIXTEEN}")
    return Image.fromarray(values / np.float32(SIXTEEN))


def _centre(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Decode an image file in the block; whatever a decoder raises becomes a DataError."""
    with _file(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=_formats()) as image:
                yield image
        except (DataError, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(
                f"{shown(path)}: cannot be read as an image: too many pixels ({error}); resize it "
                "first, or move it away"
            ) from None
        except Exception as error:  # decoders raise many types of errors on damaged files
            raise DataError(f"{shown(path)}: cannot be read as an image ({error})") from error


@contextmanager
def _file(path: str) -> Iterator[BufferedReader]:
    """A regular file, opened for reading."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(regular_file(Path(path)))
        except OSError as error:
            raise DataError(f"{shown(path)}: cannot be read ({error.strerror})") from None
        yield file


def _formats() -> list[str]:
    """The members of `FORMATS` that this Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
