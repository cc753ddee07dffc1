"""Curves of a run: its metrics and events, reduced to what a chart can show."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jemkit.errors import DataError
from jemkit.metrics.charts import Axes, Panel, Series, key_of, lines, picture
from jemkit.runtime.files import write_text
from jemkit.runtime.opening import LOG_LIMIT, read_file

POINTS = 400
KINDS = ("loss", "E(", "gap", "gradient norm", "accuracy", "sampler/", "ascent/")


LEGEND = {
    "gap x+ x-": "E(x+) - E(x-)",
    "gap x~ x": "E(x~) - E(x)",
    "loss": "weighted sum",
    "pgd10": "accuracy under PGD-10",
}
"""Columns of metrics.csv with another name in charts."""


class Curve(NamedTuple):
    """One column of metrics.csv against the step; NaN is a gap."""

    x: list[float]
    y: list[float]
    lost: int  # values that are not finite


def metrics(folder: Path) -> dict[str, Curve]:
    """The columns that charts show, by name; none if the run has no metrics.csv."""
    reader = csv.reader(_text(folder / "metrics.csv").splitlines())
    try:
        names = next(reader, [])
        rows = [row for row in reader if len(row) == len(names)]  # a line cut off by a kill
    except csv.Error:  # damaged: a resumed run renames it
        return {}
    if "step" not in names:
        return {}
    steps = [_number(row[names.index("step")]) for row in rows]
    return {
        name: _thinned(steps, [row[at] for row in rows])
        for at, name in enumerate(names)
        if name.startswith(KINDS) and rows
    }


def epochs(folder: Path) -> list[dict[str, Any]]:
    """The epochs of events.jsonl, the last entry for each; a resumed run repeats some."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in _text(folder / "events.jsonl").split("\n"):
        try:
            event = json.loads(line)
            if event["event"] == "epoch":
                by_step[int(event["step"])] = event
            elif event["event"] == "rollback":
                to = int(event["to"])
                by_step = {step: epoch for step, epoch in by_step.items() if step <= to}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # a line cut off by a kill
    return [by_step[step] for step in sorted(by_step)]


def save(folder: Path) -> None:
    """Losses, energies, gaps and accuracies of a run against the step, as curves.svg."""
    columns, judged = metrics(folder), epochs(folder)
    panels = [
        _panel(title, {n: (c.x, c.y) for n, c in columns.items() if n.startswith(start)})
        for title, start in (("terms", "loss"), ("mean energies", "E("), ("energy gaps", "gap"))
    ]
    accuracies = {
        f"{LEGEND.get(name, name)}, validation": (
            [float(event["step"]) for event in judged if name in event],
            [_number(event[name]) for event in judged if name in event],
        )
        for name in ("accuracy", "pgd10")
    }
    panels.append(_panel("accuracy", accuracies, (0.0, 1.0), marked=len(judged) <= 30))
    write_text(folder / "curves.svg", picture(panels))


def _panel(
    title: str,
    curves: Mapping[str, tuple[list[float], list[float]]],
    y_range: tuple[float, float] | None = None,
    *,
    marked: bool = False,
) -> Panel:
    names = [LEGEND.get(name, name) for name in curves]
    series = [
        Series(name, at, x, y, marked=marked)
        for at, (name, (x, y)) in enumerate(zip(names, curves.values(), strict=True))
    ]
    svg = lines(series, Axes(title, "step", "", None, y_range))
    return Panel(title, svg, [key_of(one) for one in series])


def _text(path: Path) -> str:
    """The text of a log, if it can be read; otherwise nothing."""
    if not path.exists():
        return ""
    try:
        return read_file(path, LOG_LIMIT).decode("utf-8-sig", errors="replace")
    except DataError:  # larger than any log
        return ""


def _thinned(steps: list[float], words: list[str]) -> Curve:
    """Means of neighbours, so many that about 400 points are left.

    A mean with a non-finite value is a gap; an empty cell is not counted.
    """
    pairs = [(x, _number(word)) for x, word in zip(steps, words, strict=True) if word]
    width = max(1, math.ceil(len(pairs) / POINTS))
    parts = [pairs[at : at + width] for at in range(0, len(pairs), width)]
    x = [part[-1][0] for part in parts]
    means = [sum(value for _, value in part) / len(part) for part in parts]
    y = [mean if math.isfinite(mean) else math.nan for mean in means]
    return Curve(x, y, sum(not math.isfinite(value) for _, value in pairs))


def _number(word: Any) -> float:
    try:
        return float(word)
    except (TypeError, ValueError):
        return math.nan
