"""Charts of the step benchmarks, from benchmarks/results to docs/images.

python benchmarks/charts.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from tools import RESULTS

IMAGES = Path(__file__).parents[1] / "docs" / "images"
BLUE, GREY, DARK = "#3b6ea5", "#b8bec6", "#333333"
SIZES = {"steps": "M", "adv_steps": "M_adv", "size": "image size"}
LABELS = {
    "released": "released schedule",
    "bare": "bare passes",
    "jemkit": "jemkit, contiguous",
    "jemkit+cl": "jemkit, channels last",
    "jemkit+cl+hold": "jemkit, channels last,\nmemory held",
    "jemkit+cl+compile": "jemkit, channels last,\nchains compiled",
    "jemkit+cl+recompute": "jemkit, channels last,\nactivation checkpointing",
    "jemkit+cl+bf16": "jemkit, channels last,\nbf16",
    "jemkit+cl+bf16+compile": "jemkit, channels last,\nbf16, compiled",
}


def figures(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["figures"] if path.exists() else None


def bars(
    title: str,
    unit: str,
    values: dict[str, float],
    marks: dict[str, float],
    path: Path,
    floors: list[float] | None = None,
) -> None:
    """Horizontal bars with their numbers, jemkit's in blue, and a line for each mark.

    Each bar has a stroke at its roofline, where it has one.
    """
    shown, axes = plt.subplots(figsize=(7, 0.5 * len(values) + 1.4), layout="constrained")
    names = [LABELS.get(name, name) for name in values]
    colours = [GREY if name in ("released", "bare") else BLUE for name in values]
    container = axes.barh(names, list(values.values()), color=colours)
    numbers = [f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in values.values()]
    for number in axes.bar_label(container, labels=numbers, padding=3, color=DARK):
        number.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    for label, value in marks.items():
        axes.axvline(value, color=DARK, linestyle=":", label=f"{label}: {value:.3g} {unit}")
    if floors:
        low, high = ([i + side for i in range(len(floors))] for side in (-0.4, 0.4))
        axes.vlines(floors, low, high, color=DARK, linewidth=2, label="roofline (compute)")
    if marks or floors:
        axes.legend(loc="lower right", frameon=False)
    axes.invert_yaxis()
    axes.set_title(title, loc="left")
    axes.set_xlabel(unit)
    axes.margins(x=0.12, y=0.02)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    shown.savefig(path, dpi=130)
    plt.close(shown)


def against_released(results: dict[str, Any]) -> None:
    steps, floors = results["steps"], results["floor"]
    bars(
        "One step", "s",
        {name: step["wall_s"] for name, step in steps.items()},
        {"float32's roofline, channels last": floors["channels_last"]["floor_arithmetic_s"]},
        IMAGES / "step-time.png",
    )  # fmt: skip
    bars(
        "Peak memory of a step, beyond the model and its buffer", "MiB",
        {name: step["step_mib"] for name, step in steps.items()}, {},
        IMAGES / "step-memory.png",
    )  # fmt: skip


def every_part(parts: dict[str, Any]) -> None:
    bars(
        "One step of every backbone with every objective", "s",
        {name: step["wall_s"] for name, step in parts.items()}, {},
        IMAGES / "step-parts.png",
        [step["floor_arithmetic_s"] for step in parts.values()],
    )  # fmt: skip


def scales(by_name: dict[str, Any]) -> None:
    """A panel for each size that was grown: what a step took of its time at the first value."""
    shown, panels = plt.subplots(1, len(by_name), figsize=(13, 2.8), layout="constrained")
    for axes, (name, by_value) in zip(panels, by_name.items(), strict=True):
        values = [int(value) for value in by_value]
        axes.plot(values, [step["wall_s"] for step in by_value.values()], "o-", color=BLUE)
        axes.set_xlabel(SIZES.get(name, name))
        axes.set_ylim(0, 1.1 * max(step["wall_s"] for step in by_value.values()))
        axes.set_xticks(values)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("s")
    shown.savefig(IMAGES / "step-scaling.png", dpi=130)
    plt.close(shown)


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    charts = {
        "step_against_released": against_released,
        "step_parts": every_part,
        "step_scaling": scales,
    }
    for name, chart in charts.items():
        content = figures(name)
        if content is not None:
            chart(content)
