"""Grids of images as PNG."""

import io
from pathlib import Path

import torch
from torch import Tensor

from jemkit.runtime.files import write_bytes


def save_grid(path: Path, pixels: Tensor) -> None:
    """`grid` in a file."""
    write_bytes(path, grid(pixels))


def to_bytes(pixels: Tensor) -> Tensor:
    """[0, 1] to 0..255, rounded and clamped."""
    return (pixels.detach() * 255).round().clamp(0, 255).to(torch.uint8)


def grid(pixels: Tensor) -> bytes:
    """Images [N, C, H, W] in [0, 1] as one PNG, ten in a row, rounded to 8 bits; small ones are
    enlarged."""
    return _png(_tiled(to_bytes(pixels), 10), pixels.shape[-1])


def neighbours(samples: Tensor, nearest: Tensor) -> bytes:
    """Samples [N, C, H, W] in the first row; below a white line the nearest training images, a PNG.

    These are [N, k, C, H, W], the nearest first.
    """
    top = _tiled(to_bytes(samples), len(samples))
    below = _tiled(to_bytes(nearest).transpose(0, 1).flatten(0, 1), len(samples))
    line = torch.full((top.shape[0], 2, top.shape[2]), 255, dtype=torch.uint8)
    return _png(torch.cat([top, line, below], dim=1), samples.shape[-1])


def _tiled(images: Tensor, columns: int) -> Tensor:
    """uint8 images [N, C, H, W] side by side in rows, one grey pixel between them, [C, ...]."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    canvas = torch.full((rows * columns, channels, height + 1, width + 1), 128, dtype=torch.uint8)
    canvas[:n, :, 1:, 1:] = images.cpu()
    shelf = canvas.view(rows, columns, channels, height + 1, width + 1).permute(2, 0, 3, 1, 4)
    flat = shelf.reshape(channels, rows * (height + 1), columns * (width + 1))
    return torch.nn.functional.pad(flat, (0, 1, 0, 1), value=128)


def _png(canvas: Tensor, size: int) -> bytes:
    """A PNG of images of `size` pixels, enlarged to about 64."""
    from PIL import Image

    scale = max(1, 64 // size)
    array = canvas.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
