"""The figure of a study as SVG: energies, accuracies, or samples, one panel for each method."""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path

from jemkit.errors import DataError
from jemkit.evaluation.report.gallery import PNG
from jemkit.metrics import charts
from jemkit.metrics import record as records
from jemkit.metrics.charts import Axes, Key, Panel, Series
from jemkit.metrics.figures import Figure
from jemkit.metrics.record_file import Record
from jemkit.runtime.html import Html, tag
from jemkit.runtime.opening import read_file
from jemkit_cli.study.table import Line, Table, record_of

SETS = {"clean": "clean", "adversarial": "under PGD-20", "generated": "generated"}
LARGEST = 2**26
"""Largest picture that is read, in bytes."""


def drawing(table: Table, title: Callable[[str], str]) -> str:
    """The figure that the study names; `title` is that of a column.

    A run of the first seed stands for its method. What is not measured has an empty panel.
    """
    forms = {"energies": _energies, "trade-off": lambda t: _trade_off(t, title),
             "samples": _samples}  # fmt: skip
    return charts.picture(forms[table.study.figure or "energies"](table), columns=3)


def _records(table: Table) -> list[tuple[Line, Path, Record | None]]:
    """Each line with the folder and the record of its first run."""
    entries = []
    for line in table.lines:
        folder = Path(line.runs[0]) if line.runs else Path()
        known = line.checkpoints[:1] != ["None"]  # a record may lack the hash
        weights = line.checkpoints[0] if line.runs and known else None
        entries.append((line, folder, record_of(folder, weights) if line.runs else None))
    return entries


def _energies(table: Table) -> list[Panel]:
    """Histograms of E(x, y), as in the paper's Figure 1."""
    panels = []
    for line, _, record in _records(table):
        sets = record.tables.get("energies", {}).get("joint") if record else None
        axes = Axes(line.name, "E(x, y)", "share of images")
        if sets is None:
            panels.append(Panel(f"{line.name}: not measured", charts.histogram([], {}, 0, axes)))
        else:
            chart, legend = charts.histograms(sets, SETS, 0, axes)
            panels.append(Panel(line.name, chart, legend))
    return panels


def _trade_off(table: Table, title: Callable[[str], str]) -> list[Panel]:
    """Accuracy under each attack against clean accuracy: ours, then the paper's."""
    panels = []
    for name in (column for column in table.study.columns if _is_attacked(table, column)):
        ours = [_measured(line, name, at) for at, line in enumerate(table.lines)]
        panels.append(_accuracies(ours, title(name), "measured here"))
    for name in dict.fromkeys(n for line in table.lines for n in line.paper if n != "clean"):
        theirs = [
            Series(line.name, at, [line.paper["clean"] / 100], [line.paper[name] / 100])
            for at, line in enumerate(table.lines)
            if {"clean", name} <= set(line.paper)
        ]
        if theirs:
            panels.append(_accuracies(theirs, title(name), "as printed in the paper"))
    return panels


def _is_attacked(table: Table, name: str) -> bool:
    """Whether a column is accuracy under an attack, as far as it is measured."""
    measured = [cell for line in table.lines if (cell := line.cells.get(name)) is not None]
    return name != "clean" and all(cell.share for cell in measured)


def _measured(line: Line, name: str, slot: int) -> Series:
    """The point of a method; none if one of its accuracies is not measured."""
    clean, robust = line.cells.get("clean"), line.cells.get(name)
    if clean is None or robust is None:
        return Series(f"{line.name}: not measured", slot, [], [])
    low, high = ([robust.mean if end is None else end] for end in (robust.low, robust.high))
    return Series(line.name, slot, [clean.mean], [robust.mean], low, high)


def _accuracies(series: Sequence[Series], attack: str, origin: str) -> Panel:
    axes = Axes(attack, "clean accuracy", f"accuracy under {attack}")
    marked = [each._replace(marked=True) for each in series]
    return Panel(
        f"{attack}, {origin}", charts.lines(marked, axes), list(map(charts.key_of, marked))
    )


def _samples(table: Table) -> list[Panel]:
    """Samples of new chains, as in the paper's Figure 3."""
    panels = []
    for line, folder, record in _records(table):
        path = records.pictures(folder, record).get("samples") if record else None
        if path is None:
            panels.append(Panel(f"{line.name}: no samples", Html("")))
        else:
            panels.append(Panel(line.name, _embedded(path), [_protocol(record)]))
    return panels


def _embedded(path: Path) -> Html:
    picture = read_file(path, LARGEST)
    if not picture.startswith(PNG):
        raise DataError(f"{path} is not a PNG")
    content = base64.b64encode(picture).decode()
    return tag(
        "image", href=f"data:image/png;base64,{content}", x=0, y=0, width=charts.HEIGHT,
        height=charts.HEIGHT,
    )  # fmt: skip


def _protocol(record: Record | None) -> Key:
    """How the samples were drawn, as a legend without a sign."""
    figures = record.figures if record else []
    for figure in figures:
        if figure.protocol.get("split") == "generated":
            return Key(Html(""), _drawn(figure))
    return Key(Html(""), "")


def _drawn(figure: Figure) -> str:
    return f"chains of {figure.protocol.get('steps')} steps, {figure.protocol.get('sampler')}"
