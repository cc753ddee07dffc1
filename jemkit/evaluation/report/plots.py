"""The charts of a report, and its sections with charts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from jemkit.evaluation.report.book import UNDRAWABLE, Book, drawn, section
from jemkit.metrics import charts
from jemkit.metrics.charts import Axes, Key, Panel, Series, key_of
from jemkit.metrics.curves import KINDS, LEGEND, Curve, epochs, metrics
from jemkit.runtime.html import Html, tag

SETS = {"clean": "clean, x", "adversarial": "adversarial, x~", "generated": "generated"}
NORMS = {"Linf": "L∞"}
GROUPS = {
    "loss": "Terms of the loss", "E(": "Mean energies", "gap": "Energy gaps",
    "gradient norm": "Gradient norm", "accuracy": "Accuracy", "sampler/": "Sampler",
    "ascent/": "Ascent",
}  # fmt: skip
"""The titles of charts with all curves of a kind of one run."""


def panels(book: Book) -> tuple[list[Panel], list[str]]:
    """Every chart of a report, and what cannot be drawn."""
    drawn_panels: list[Panel] = []
    faults = []
    for kind in (_robustness, _energies, _calibration, _ood, _training):
        try:
            drawn_panels += kind(book)
        except UNDRAWABLE as error:
            name = kind.__name__.strip("_")
            faults.append(f"the {name} of the records cannot be drawn: {error!r}")
    return drawn_panels, faults


def robustness(book: Book) -> Html | None:
    """Accuracy against the radius and the steps of an attack; one chart each."""
    return _section("robustness", _robustness(book))


def energies(book: Book) -> Html | None:
    """Histograms of each run's energies, energies against confidence, and along an attack."""
    return _section("energies", _energies(book))


def calibration(book: Book) -> Html | None:
    """Accuracy against confidence, bin by bin."""
    return _section("calibration", _calibration(book))


def ood(book: Book) -> Html | None:
    """Energies of other images and of the test images, one chart per run."""
    return _panels(list(_ood(book)))


def training(book: Book) -> Html | None:
    """Terms, energies and gaps against the step, and validation results after each epoch."""
    return _section("training", _training(book))


def _energies(book: Book) -> Iterator[Panel]:
    for slot, run in enumerate(book.runs):
        table = run.record.tables.get("energies")
        if table:
            yield _histograms(book, slot, table, "E(x)")
        if table and "joint" in table:
            yield _histograms(book, slot, table["joint"], "E(x, y)")
        if points := run.record.tables.get("energy_confidence"):
            yield _confidence(book, slot, points)
    yield from _paths(book)


def _paths(book: Book) -> Iterator[Panel]:
    """Mean energies along an attack; those of a single run are in one chart."""
    stored = [run.record.tables.get("energy_path") or {} for run in book.runs]
    curves = {
        label: [_way(run.name, slot, stored[slot], name)
                for slot, run in enumerate(book.runs) if name in stored[slot]]
        for name, label in (("mean", "E(x)"), ("joint", "E(x, y)"))
    }  # fmt: skip
    curves = {label: series for label, series in curves.items() if series}
    if len(book.runs) == 1:
        both = [s._replace(label=label, slot=at)
                for at, (label, (s,)) in enumerate(curves.items())]  # fmt: skip
        if both:
            axes = Axes("Mean energies along the attack", "step of the attack", "energy")
            yield Panel(
                axes.title, charts.lines(both, axes), list(map(key_of, both)), "energy-path",
                book.label(0, "energy_path"), _bars(both),
            )  # fmt: skip
        return
    for label, series in curves.items():
        axes = Axes(f"Mean {label} along the attack", "step of the attack", label)
        name = "energy-path" if label == "E(x)" else "joint-energy-path"
        yield book.judged_lines(name, series, axes, *_bars(series), table="energy_path")


def _bars(series: Sequence[Series]) -> list[str]:
    return ["bars hold 80 % of the images"] if any(curve.low for curve in series) else []


def _robustness(book: Book) -> Iterator[Panel]:
    for name, of in (("radius_curve", "radius"), ("steps_curve", "steps")):
        kinds: dict[tuple[str, str], list[Series]] = {}
        counts: dict[tuple[str, str], dict[str, Any]] = {}
        for slot, run in enumerate(book.runs):
            if table := run.record.tables.get(name):
                kind = (str(table.get("attack", "?")), str(table.get("norm", "?")))
                x, y, low, high = map(_numbers, zip(*table["points"], strict=True))
                curve = Series(run.name, slot, x, y, low, high, marked=True)
                kinds.setdefault(kind, []).append(curve)
                counts.setdefault(kind, {})[book.names[slot]] = table.get("n")
        for (attack, norm), series in kinds.items():
            norm_name = NORMS.get(norm, norm)
            title = f"Accuracy against the {of}: {attack}, {norm_name}"
            label = f"{norm_name} radius, in 1/255" if of == "radius" else "steps of the attack"
            axes = Axes(title, label, "accuracy", None, (0.0, 1.0))
            note = _images_of(counts[attack, norm])
            yield book.judged_lines(f"{of}-{attack}-{norm}", series, axes, note, table=name)


def _images_of(counts: Mapping[str, Any]) -> str:
    images = [f"{n} images of {run}" for run, n in counts.items()]
    if len(numbers := set(counts.values())) == 1:
        images = [f"{numbers.pop()} images"]
    return (
        f"{', '.join(images)}: the first ones, until the indicators have enough that are right, "
        "and not all that the figures above are of; bars are 95 % intervals"
    )


def _calibration(book: Book) -> Iterator[Panel]:
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
        return
    unit = (0.0, 1.0)
    axes = Axes("Reliability", "confidence", "accuracy", unit, unit, diagonal=True)
    remark = "On the dashed line, confidence equals accuracy."
    yield book.judged_lines("reliability", series, axes, remark, table="reliability")
    for slot, edges, counts in tables:
        title = f"Confidences of {book.names[slot]}"
        total = sum(counts) or 1.0
        shares = {"all": [n / total for n in counts]}
        chart = charts.histogram(
            _numbers(edges), shares, slot, Axes(title, "confidence", "share of images")
        )
        label = book.label(slot, "reliability")
        yield Panel(title, chart, (), f"confidences-{book.names[slot]}", label)


def _ood(book: Book) -> Iterator[Panel]:
    for slot, run in enumerate(book.runs):
        if table := run.record.tables.get("ood_energies"):
            edges = _numbers(table["edges"])
            middles = [(low + high) / 2 for low, high in pairwise(edges)]
            sets = [name for name in table["n"] if name in table]
            sets.sort(key=lambda name: (name != "test", name))
            series = [Series(name, at, middles, table[name]) for at, name in enumerate(sets)]
            name = book.names[slot]
            axes = Axes(f"E(x) of test and other images: {name}", "E(x)", "share of images")
            yield Panel(
                axes.title, charts.lines(series, axes), list(map(key_of, series)),
                f"ood-energies-{name}", book.label(slot, "ood_energies"),
            )  # fmt: skip


def _training(book: Book) -> Iterator[Panel]:
    read = [metrics(run.folder) for run in book.runs]
    yield from _validation(book)
    names = sorted({name for curves in read for name in curves}, key=_place)
    for name in names:
        of = [slot for slot, curves in enumerate(read) if name in curves]
        if len(of) > 1:
            series = [Series(book.names[s], s, read[s][name].x, read[s][name].y) for s in of]
            label = LEGEND.get(name, name)
            axes = Axes(label if name.startswith("gap") else name, "step", label)
            notes = _lost({book.names[slot]: read[slot][name] for slot in of})
            yield book.lines(f"training-{name}", series, axes, *notes)
    for slot, curves in enumerate(read):
        alone = [name for name in names if [slot] == [s for s, c in enumerate(read) if name in c]]
        for kind in KINDS:
            of_kind = {name: curves[name] for name in alone if name.startswith(kind)}
            if of_kind:
                yield _grouped(book, slot, kind, of_kind)


def _grouped(book: Book, slot: int, kind: str, curves: Mapping[str, Curve]) -> Panel:
    """The curves of one kind that only one run has, in one chart."""
    series = [
        Series(LEGEND.get(name, name), at, curve.x, curve.y)
        for at, (name, curve) in enumerate(curves.items())
    ]
    of = f" of {book.names[slot]} alone" if len(book.runs) > 1 else ""
    (only, *more) = series
    axes = Axes(f"{GROUPS[kind]}{of}", "step", "" if more else only.label)
    keys = list(map(key_of, series)) if more else []
    name = f"training-{GROUPS[kind]}{of}"
    return Panel(axes.title, charts.lines(series, axes), keys, name, notes=_lost(curves))


def _lost(curves: Mapping[str, Curve]) -> list[str]:
    """A note on the values that are not finite."""
    lost = [f"{name}: {c.lost} values are not finite" for name, c in curves.items() if c.lost]
    return [f"{'; '.join(lost)}; the gaps in the curve"] if lost else []


def _histograms(book: Book, slot: int, table: Mapping[str, Any], which: str) -> Panel:
    name = book.names[slot]
    axes = Axes(f"{which} of {name}", which, "share of images")
    chart, keys = charts.histograms(table, SETS, slot, axes)
    of = {"E(x)": "energies", "E(x, y)": "joint-energies"}[which]
    return Panel(axes.title, chart, keys, f"{of}-{name}", book.label(slot, "energies"))


def _confidence(book: Book, slot: int, points: Sequence[Sequence[float]]) -> Panel:
    """Energy against confidence, image by image."""
    groups = [[(float(x), float(y)) for x, y, right in points if right == is_right]
              for is_right in (1.0, 0.0)]  # fmt: skip
    axes = Axes("Energy against confidence", "E(x)", "largest p(y | x)", None, (0.0, 1.0))
    keys = [
        Key(charts.dots_key(slot, at), f"{name}, {len(group)}")
        for at, (name, group) in enumerate(zip(("right", "wrong"), groups, strict=True))
    ]
    name = book.names[slot]
    chart = charts.scatter(groups[0], groups[1], slot, axes)
    label = book.label(slot, "energy_confidence")
    return Panel(f"{axes.title}: {name}", chart, keys, f"energy-confidence-{name}", label)


def _way(name: str, slot: int, path: Mapping[str, Any], which: str) -> Series:
    """The mean energy at each step; the table has quantiles only of E(x)."""
    steps, values = _numbers(path["steps"]), _numbers(path[which])
    if which != "mean" or "low" not in path or path.get("quantiles") != [0.1, 0.9]:
        return Series(name, slot, steps, values, marked=True)
    low, high = _numbers(path["low"]), _numbers(path["high"])
    return Series(name, slot, steps, values, low, high, marked=True)


def _validation(book: Book) -> Iterator[Panel]:
    """Validation accuracies; those of a single run are in one chart."""
    curves: dict[str, list[Series]] = {"Validation accuracy": [],
                                       "Validation accuracy under PGD-10": []}  # fmt: skip
    for slot, run in enumerate(book.runs):
        history = epochs(run.folder)
        for name, series in zip(("accuracy", "pgd10"), curves.values(), strict=True):
            if points := [(event["step"], event[name]) for event in history if name in event]:
                x, y = map(_numbers, zip(*points, strict=True))
                series.append(Series(book.names[slot], slot, x, y))
    unit = (0.0, 1.0)
    if len(book.runs) == 1:
        words = ("clean", "under PGD-10")
        both = [s._replace(label=word, slot=at)
                for at, (word, of) in enumerate(zip(words, curves.values(), strict=True))
                for s in of]  # fmt: skip
        axes = Axes("Validation accuracy", "step", "accuracy", None, unit)
        if both:
            chart = charts.lines(both, axes)
            yield Panel(axes.title, chart, list(map(key_of, both)), "validation")
        return
    for title, series in curves.items():
        if series:
            yield book.lines(title, series, Axes(title, "step", "accuracy", None, unit))


def _place(name: str) -> tuple[int, str]:
    order = ("loss", "E(", "gap", "accuracy", "gradient")
    return next((i for i, kind in enumerate(order) if name.startswith(kind)), len(order)), name


def _section(name: str, panels: Iterator[Panel]) -> Html | None:
    whole = _panels(list(panels))
    return section(name, name.capitalize(), whole) if whole else None


def _panels(panels: Sequence[Panel]) -> Html | None:
    return tag("div", *map(drawn, panels), class_="panels") if panels else None


def _numbers(values: Sequence[Any]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]
