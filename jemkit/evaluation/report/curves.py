"""A run's metrics and events, thinned out to what a chart can show."""

import csv
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from jemkit.runtime.opening import LOG_LIMIT, read_file

POINTS = 400
KINDS = ("loss", "E(", "gap", "gradient norm", "accuracy")


class Curve(NamedTuple):
    """One column of metrics.csv against the step; NaN is a gap."""

    x: list[float]
    y: list[float]
    lost: int  # values that are not finite


def metrics(folder: Path) -> dict[str, Curve]:
    """The columns that a chart shows, by name; none where the run has no metrics.csv."""
    reader = csv.reader(_text(folder / "metrics.csv").splitlines())
    try:
        names = next(reader, [])
        rows = [row for row in reader if len(row) == len(names)]  # a line cut off by a kill
    except csv.Error:  # damaged: a run that goes on sets it aside
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
    """The epochs of events.jsonl, the last word on each; a resumed run tells some twice."""
    found: dict[int, dict[str, Any]] = {}
    for line in _text(folder / "events.jsonl").split("\n"):
        try:
            event = json.loads(line)
            if event["event"] == "epoch":
                found[int(event["step"])] = event
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # a line cut off by a kill
    return [found[step] for step in sorted(found)]


def _text(path: Path) -> str:
    """What a log holds, as far as it is text; none where the run has no such log."""
    if not path.exists():
        return ""
    return read_file(path, LOG_LIMIT).decode("utf-8-sig", errors="replace")


def _thinned(steps: list[float], words: list[str]) -> Curve:
    """Means of as many neighbours as leave some 400 points.

    A mean with a value that is not finite is a gap; an empty cell is no value.
    """
    pairs = [(x, _number(word)) for x, word in zip(steps, words, strict=True) if word]
    width = max(1, math.ceil(len(pairs) / POINTS))
    parts = [pairs[at : at + width] for at in range(0, len(pairs), width)]
    x = [part[-1][0] for part in parts]
    y = [_mean([value for _, value in part]) for part in parts]
    return Curve(x, y, sum(not math.isfinite(value) for _, value in pairs))


def _mean(values: list[float]) -> float:
    total = sum(values)
    return total / len(values) if math.isfinite(total) else math.nan


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan
