"""The sections of a report with charts."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from jemkit.evaluation.report.book import Book, legend, note, panel, section
from jemkit.metrics import charts
from jemkit.metrics.charts import Axes, Series
from jemkit.metrics.curves import epochs, metrics
from jemkit.runtime.html import Html, join, tag

SETS = {"clean": "clean, x", "adversarial": "adversarial, x~", "generated": "generated"}
ATTACKED = {"radius_curve": "radius, in 1/255", "steps_curve": "steps"}


def energies(book: Book) -> Html | None:
    """Histograms of each run's energies, energies against confidence, and along an attack."""
    panels = []
    for slot, run in enumerate(book.runs):
        table = run.record.tables.get("energies")
        if table:
            panels.append(_energies(book, slot, table, "E(x)"))
        if table and "joint" in table:
            panels.append(_energies(book, slot, table["joint"], "E(x, y)"))
        if points := run.record.tables.get("energy_confidence"):
            panels.append(_confidence(book, slot, points))
    for name, title in (
        ("mean", "Mean E(x) along the attack"),
        ("joint", "Mean E(x, y) along the attack"),
    ):
        curves = [
            _way(run.name, slot, path, name)
            for slot, run in enumerate(book.runs)
            if name in (path := run.record.tables.get("energy_path") or {})
        ]
        if curves:
            notes = ["bars hold 80 % of the images"] if any(curve.low for curve in curves) else []
            panels.append(
                book.judged_lines(
                    curves, Axes(title, "step of the attack", "energy"), *notes, table="energy_path"
                )
            )
    return _section("energies", panels)


def robustness(book: Book) -> Html | None:
    """Accuracy against the radius and the steps of an attack; one chart each."""
    panels = []
    for name, label in ATTACKED.items():
        kinds: dict[tuple[str, str], list[Series]] = {}
        counts: dict[tuple[str, str], dict[str, Any]] = {}
        for slot, run in enumerate(book.runs):
            if table := run.record.tables.get(name):
                kind = (str(table.get("attack", "?")), str(table.get("norm", "?")))
                x, y, low, high = map(_numbers, zip(*table["points"], strict=True))
                curve = Series(run.name, slot, x, y, low, high, marked=True)
                kinds.setdefault(kind, []).append(curve)
                counts.setdefault(kind, {})[run.name] = table.get("n")
        for kind, series in kinds.items():
            title = f"Accuracy against the {label.split(',')[0]}: {kind[0]}, {kind[1]}"
            axes = Axes(title, label, "accuracy", None, (0.0, 1.0))
            images = [f"{n} images of {run}" for run, n in counts[kind].items()]
            if len(numbers := set(counts[kind].values())) == 1:
                images = [f"{numbers.pop()} images"]
            notes = (
                f"{', '.join(images)}: the first ones, until the indicators have enough that "
                "are right, and not all that the figures above are of; bars are 95 % intervals"
            )
            panels.append(book.judged_lines(series, axes, notes, table=name))
    return _section("robustness", panels)


def calibration(book: Book) -> Html | None:
    """Accuracy against confidence, bin by bin."""
    series, tables = [], []
    for slot, run in enumerate(book.runs):
        table = run.record.tables.get("reliability")
        if table:
            counts = [float(n or 0) for n in table["count"]]
            keep = [at for at, n in enumerate(counts) if n > 0]
            x, y = _numbers(table["confidence"]), _numbers(table["accuracy"])
            series.append(
                Series(run.name, slot, [x[i] for i in keep], [y[i] for i in keep], marked=True)
            )
            tables.append((slot, table["edges"], counts))
    if not series:
        return None
    unit = (0.0, 1.0)
    axes = Axes("Reliability", "confidence", "accuracy", unit, unit, diagonal=True)
    remark = "On the dashed line, confidence equals accuracy."
    panels = [book.judged_lines(series, axes, remark, table="reliability")]
    for slot, edges, counts in tables:
        title = f"Confidences of {book.runs[slot].name}"
        total = sum(counts) or 1.0
        shares = {"all": [n / total for n in counts]}
        chart_html = charts.histogram(
            _numbers(edges), shares, slot, Axes(title, "confidence", "share of images")
        )
        panels.append(panel(join(title, " ", book.label(slot, "reliability")), chart_html))
    return _section("calibration", panels)


def ood(book: Book) -> Html | None:
    """Energies of other images and of the test images, one chart per run."""
    panels = []
    for slot, run in enumerate(book.runs):
        if table := run.record.tables.get("ood_energies"):
            edges = _numbers(table["edges"])
            middles = [(low + high) / 2 for low, high in pairwise(edges)]
            sets = [name for name in table["n"] if name in table]
            sets.sort(key=lambda name: (name != "test", name))
            series = [Series(name, at, middles, table[name]) for at, name in enumerate(sets)]
            names = {at: book.key(at, name) for at, name in enumerate(sets)}
            axes = Axes(f"E(x) of test and other images: {run.name}", "E(x)", "share of images")
            panels.append(book.chart(series, axes, names, book.label(slot, "ood_energies")))
    return _panels(panels) if panels else None


def training(book: Book) -> Html | None:
    """Terms, energies and gaps against the step, and validation results after each epoch."""
    read = [metrics(run.folder) for run in book.runs]
    panels = _validation(book)
    for name in sorted({name for curves in read for name in curves}, key=_place):
        series, lost = [], []
        for slot, (run, curves) in enumerate(zip(book.runs, read, strict=True)):
            if curve := curves.get(name):
                series.append(Series(run.name, slot, curve.x, curve.y))
                lost += [f"{run.name}: {curve.lost} values are not finite"] if curve.lost else []
        remark = note("; ".join(lost), "; the gaps in the curve") if lost else None
        panels.append(book.lines(series, Axes(name, "step", ""), remark))
    return _section("training", panels)


def _energies(book: Book, slot: int, table: Mapping[str, Any], which: str) -> Html:
    axes = Axes(f"{which} of {book.runs[slot].name}", which, "share of images")
    chart_html, keys = charts.histograms(table, SETS, slot, axes)
    title = join(axes.title, " ", book.label(slot, "energies"))
    return panel(title, chart_html, legend(join(sign, " ", words) for sign, words in keys))


def _confidence(book: Book, slot: int, points: Sequence[Sequence[float]]) -> Html:
    """Energy against confidence, image by image."""
    groups = [[(float(x), float(y)) for x, y, right in points if right == is_right]
              for is_right in (1.0, 0.0)]  # fmt: skip
    axes = Axes("Energy against confidence", "E(x)", "largest p(y | x)", None, (0.0, 1.0))
    keys = (
        join(charts.dots_key(slot, at), f" {name}, {len(group)}")
        for at, (name, group) in enumerate(zip(("right", "wrong"), groups, strict=True))
    )
    title = join(f"{axes.title}: {book.runs[slot].name} ", book.label(slot, "energy_confidence"))
    return panel(title, charts.scatter(groups[0], groups[1], slot, axes), legend(keys))


def _way(name: str, slot: int, path: Mapping[str, Any], which: str) -> Series:
    """The mean energy at each step; the table has quantiles only of E(x)."""
    steps, values = _numbers(path["steps"]), _numbers(path[which])
    if which != "mean" or "low" not in path or path.get("quantiles") != [0.1, 0.9]:
        return Series(name, slot, steps, values, marked=True)
    low, high = _numbers(path["low"]), _numbers(path["high"])
    return Series(name, slot, steps, values, low, high, marked=True)


def _validation(book: Book) -> list[Html]:
    histories = [epochs(run.folder) for run in book.runs]
    panels = []
    for name, title in (
        ("accuracy", "Validation accuracy"), ("pgd10", "Validation accuracy under PGD-10"),
    ):  # fmt: skip
        series = []
        for slot, (run, history) in enumerate(zip(book.runs, histories, strict=True)):
            if points := [(event["step"], event[name]) for event in history if name in event]:
                x, y = map(_numbers, zip(*points, strict=True))
                series.append(Series(run.name, slot, x, y))
        if series:
            axes = Axes(title, "step", "accuracy", None, (0.0, 1.0))
            panels.append(book.lines(series, axes))
    return panels


def _place(name: str) -> tuple[int, str]:
    order = ("loss", "E(", "gap", "accuracy", "gradient")
    return next((i for i, kind in enumerate(order) if name.startswith(kind)), len(order)), name


def _section(name: str, panels: Sequence[Html]) -> Html | None:
    return section(name, name.capitalize(), _panels(panels)) if panels else None


def _panels(panels: Sequence[Html]) -> Html:
    return tag("div", *panels, class_="panels")


def _numbers(values: Sequence[Any]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]
