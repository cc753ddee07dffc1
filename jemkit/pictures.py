"""Pictures of a run: sample grids and curves."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jemkit.runtime.files import write_bytes

LEGEND = {
    "gap x+ x-": "E(x+) - E(x-)",
    "gap x~ x": "E(x~) - E(x)",
    "loss": "weighted sum",
    "pgd10": "accuracy under PGD-10",
}
"""Columns of metrics.csv that a picture calls by another name."""


def save_grid(path: Path, pixels: Tensor, *, columns: int = 10, scale: int | None = None) -> None:
    """Images [N, C, H, W] in [0, 1] as one PNG, rounded to 8 bits; small ones are enlarged."""
    from PIL import Image

    scale = scale or max(1, 64 // pixels.shape[-1])
    tiles = to_bytes(pixels).permute(0, 2, 3, 1).cpu().numpy()
    n, height, width, channels = tiles.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 128, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = tile
    image = Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


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
    _write(figure, path)


def save_energies(path: Path, energies: Mapping[str, Tensor], title: str) -> None:
    """Histograms of E(x) of several sets of images, in the manner of the paper's Figure 1."""
    figure, axes = _figure(1, 1)
    everything = torch.cat([e.flatten().cpu() for e in energies.values()])
    low, high = float(everything.min()), float(everything.max())
    margin = 0.0 if high > low else 0.5  # a constant energy is a single bar
    edges = np.linspace(low - margin, high + margin, 32)
    for name, energy in energies.items():
        values, label = energy.cpu().numpy(), f"{name}, {len(energy)} images"
        weights = np.full(len(values), 1 / len(values))
        _, _, filled = axes[0].hist(
            values, edges, weights=weights, alpha=0.3, histtype="stepfilled", label=label
        )
        colour = filled[0].get_facecolor()[:3]
        axes[0].hist(values, edges, weights=weights, histtype="step", color=colour, linewidth=1.5)
    axes[0].set_ylabel("share")
    _finish(axes[0], title, xlabel="E(x)")
    _write(figure, path)


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


def _write(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
