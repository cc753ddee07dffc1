"""Pictures of a run: sample grids and curves."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jemkit.metrics.figures import histograms
from jemkit.runtime.files import write_bytes

LEGEND = {
    "gap x+ x-": "E(x+) - E(x-)",
    "gap x~ x": "E(x~) - E(x)",
    "loss": "weighted sum",
    "pgd10": "accuracy under PGD-10",
}
"""Columns of metrics.csv that a picture calls by another name."""


def save_grid(path: Path, pixels: Tensor, *, columns: int = 10, scale: int | None = None) -> None:
    """`grid` in a file."""
    write_bytes(path, grid(pixels, columns=columns, scale=scale))


def to_bytes(pixels: Tensor) -> Tensor:
    """[0, 1] to 0..255, rounded and clamped."""
    return (pixels.detach() * 255).round().clamp(0, 255).to(torch.uint8)


def save_curves(
    path: Path, rows: Sequence[Mapping[str, str]], epochs: Sequence[Mapping[str, Any]]
) -> None:
    """Losses, energies, gaps and accuracies against the step, as one PNG."""
    figure, axes = _figure(2, 2)
    steps = [int(row["step"]) for row in rows]
    panels = {
        "terms": [c for c in rows[0] if c.startswith("loss")],
        "mean energies": [c for c in rows[0] if c.startswith("E(")],
        "energy gaps": [c for c in rows[0] if c.startswith("gap")],
    }
    for axis, (title, columns) in zip(axes, panels.items(), strict=False):
        for column in columns:
            values = np.array([float(row[column] or "nan") for row in rows])
            axis.plot(steps, smoothed(values), label=LEGEND.get(column, column), linewidth=1)
        _finish(axis, title)
    for name in ("accuracy", "pgd10"):
        points = [(e["step"], e[name]) for e in epochs if name in e]
        label = LEGEND.get(name, name)
        axes[3].plot(*zip(*points, strict=True), marker=".", label=f"{label}, validation")
    axes[3].set_ylim(0, 1.02)
    _finish(axes[3], "accuracy")
    write_bytes(path, _drawn(figure))


def save_energies(path: Path, energies: Mapping[str, Tensor], title: str) -> None:
    """Histograms of E(x) of several sets of images, in the manner of the paper's Figure 1."""
    rows = {name: energy.detach().cpu().flatten() for name, energy in energies.items()}
    write_bytes(path, histograms_png({title: histograms(rows)}))


def smoothed(values: np.ndarray[Any, Any], share: float = 0.01) -> np.ndarray[Any, Any]:
    """A running mean over the last hundredth of the run; a value that is not finite stays one."""
    window = max(1, int(len(values) * share))
    padded = np.concatenate([np.full(window - 1, values[0]), values])
    return np.convolve(padded, np.full(window, 1 / window), mode="valid")


def _figure(rows: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.ravel(figure.subplots(rows, columns)))


def _finish(axis: Any, title: str, xlabel: str = "step") -> None:
    axis.set_title(title)
    axis.set_xlabel(xlabel)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def grid(pixels: Tensor, *, columns: int = 10, scale: int | None = None) -> bytes:
    """Images [N, C, H, W] in [0, 1] as one PNG, rounded to 8 bits; small ones are enlarged."""
    return _png(_tiled(to_bytes(pixels), columns), scale or max(1, 64 // pixels.shape[-1]))


def neighbours(samples: Tensor, nearest: Tensor, *, scale: int | None = None) -> bytes:
    """Samples [N, C, H, W] in the first row, and under a white line the training images [N, k, C,
    H, W] nearest to each, nearest first; a PNG."""
    top = _tiled(to_bytes(samples), len(samples))
    below = _tiled(to_bytes(nearest).transpose(0, 1).flatten(0, 1), len(samples))
    line = torch.full((top.shape[0], 2, top.shape[2]), 255, dtype=torch.uint8)
    whole = torch.cat([top, line, below], dim=1)
    return _png(whole, scale or max(1, 64 // samples.shape[-1]))


def _tiled(images: Tensor, columns: int) -> Tensor:
    """uint8 images [N, C, H, W] side by side in rows, one grey pixel between them, [C, ...]."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    canvas = torch.full((rows * columns, channels, height + 1, width + 1), 128, dtype=torch.uint8)
    canvas[:n, :, 1:, 1:] = images.cpu()
    shelf = canvas.view(rows, columns, channels, height + 1, width + 1).permute(2, 0, 3, 1, 4)
    flat = shelf.reshape(channels, rows * (height + 1), columns * (width + 1))
    return torch.nn.functional.pad(flat, (0, 1, 0, 1), value=128)


def _png(canvas: Tensor, scale: int) -> bytes:
    from PIL import Image

    array = canvas.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def histograms_png(panels: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Tables of `jemkit.metrics.figures`, a panel for each under its title."""
    figure, axes = _figure(1, len(panels))
    for axis, (title, table) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(name for name in table["n"] if name in table):
            label = f"{name}, {table['n'][name]} images, mean {table['mean'][name]:.3g}"
            look: dict[str, Any] = {"color": f"C{i}"}
            axis.stairs(table[name], table["edges"], fill=True, alpha=0.25, **look)
            axis.stairs(table[name], table["edges"], linewidth=1.5, label=label, **look)
        axis.set_ylabel("share")
        axis.set_ylim(top=axis.get_ylim()[1] * 1.4)  # the legend stands above the bars
        _finish(axis, title, xlabel="energy")
    return _drawn(figure)


def curves_png(
    steps: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    band: tuple[Sequence[float], Sequence[float]],
    title: str,
) -> bytes:
    """Lines against the step; the band, from a low to a high quantile, is of the first of them."""
    figure, (axis,) = _figure(1, 1)
    for name, values in lines.items():
        axis.plot(steps, values, marker=".", label=name)
    label = f"{next(iter(lines))}, most images"
    axis.fill_between(steps, *band, alpha=0.2, color="C0", linewidth=0, label=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    _finish(axis, title)
    return _drawn(figure)


def scatter_png(points: Sequence[Sequence[float]], title: str) -> bytes:
    """[E(x), confidence, whether it is right] of images: energy against confidence."""
    figure, (axis,) = _figure(1, 1)
    for name, sign, right in (("right", ".", 1.0), ("wrong", "x", 0.0)):
        some = [(energy, sure) for energy, sure, was in points if was == right]
        if some:
            axis.plot(*zip(*some, strict=True), sign, alpha=0.5, label=f"{name}, {len(some)}")
    axis.set_ylabel("largest p(y | x)")
    _finish(axis, title, xlabel="E(x)")
    return _drawn(figure)


def reliability_png(table: Mapping[str, Any], title: str) -> bytes:
    """Accuracy against confidence, bin by bin, over the share of images in each."""
    figure, (left, right) = _figure(1, 2)
    accuracy = [np.nan if value is None else value for value in table["accuracy"]]
    points = [(c, a) for c, a in zip(table["confidence"], accuracy, strict=True) if c is not None]
    left.stairs(accuracy, table["edges"], fill=True, alpha=0.4, label="accuracy")
    left.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
    left.plot(*zip(*points, strict=True), ".", color="C1", label="at the bin's mean confidence")
    left.set_ylim(0, 1.02)
    right.stairs(table["count"], table["edges"], fill=True, alpha=0.4)
    right.set_ylabel("images")
    _finish(left, title, xlabel="confidence")
    _finish(right, "images in each bin", xlabel="confidence")
    return _drawn(figure)


def _drawn(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
