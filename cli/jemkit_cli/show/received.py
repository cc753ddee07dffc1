"""What a browser sends: an image file or a drawing, checked before it is an image."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageOps
from torch import Tensor

from jemkit.data import Shape
from jemkit.errors import DataError
from jemkit.runtime.opening import MIB, read_file

LARGEST = 8 * MIB
"""The size in bytes of a file above which it is not read."""

PIXELS = 32 * 10**6
"""The number of pixels above which an image is not decoded."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
"""Formats that are decoded, whatever a file's name is."""


def file_image(path: Path, shape: Shape) -> Tensor:
    """An image file as [1, C, H, W] in [0, 1]: its centre square, resized to the model's size.

    DataError if it is too large, of another format or damaged.
    """
    content = read_file(path, LARGEST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        try:
            with Pillow.open(io.BytesIO(content), formats=FORMATS) as raw:
                return _resized(_checked(raw), shape)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # decoders raise many types of errors on damaged files
            kinds = f"expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
            raise DataError(f"the file cannot be read as an image; {kinds}") from error


def _checked(raw: Pillow.Image) -> Pillow.Image:
    """The decoded image, upright and blended with white, if its header names no huge size."""
    width, height = raw.size
    if width * height > PIXELS:
        raise DataError(
            f"an image of {width} x {height} px; expected {PIXELS:,} pixels at most: resize it"
        )
    upright = ImageOps.exif_transpose(raw)
    page = Pillow.new("RGBA", upright.size, "white")
    return Pillow.alpha_composite(page, upright.convert("RGBA")).convert("RGB")


def _resized(image: Pillow.Image, shape: Shape) -> Tensor:
    channels, height, width = shape
    square = ImageOps.fit(image, (width, height), Pillow.Resampling.BOX)
    pixels = np.array(square.convert("L" if channels == 1 else "RGB"))
    x = torch.from_numpy(pixels).float() / 255
    return (x[None] if channels == 1 else x.permute(2, 0, 1))[None]


def drawn_image(text: str, shape: Shape) -> Tensor:
    """A drawing as [1, C, H, W] in [0, 1]: two hexadecimal digits for each value, [H, W, 3]."""
    channels, height, width = shape
    size = height * width * 3
    try:
        values = bytes.fromhex(text) if len(text) <= 2 * size else b""
    except ValueError:
        values = b""
    if len(values) != size:
        raise DataError(
            f"a drawing of {len(text):,} characters; expected {2 * size:,} hexadecimal digits, "
            f"{height} x {width} pixels of 3 values"
        )
    x = torch.tensor(list(values)).view(height, width, 3).permute(2, 0, 1).float() / 255
    return (x.mean(0, keepdim=True) if channels == 1 else x)[None]
