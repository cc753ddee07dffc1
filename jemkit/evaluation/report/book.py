"""Code shared by the sections of a report: runs, figures with protocol cards, charts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jemkit.config.layers import flat
from jemkit.evaluation.run_table import Judged, other_images, shown, shown_interval
from jemkit.metrics import charts
from jemkit.metrics.charts import Axes, Series
from jemkit.metrics.figures import Figure
from jemkit.runtime.html import Html, join, tag

LAST = ("checkpoint", "device", "evaluator", "versions", "seconds", "max delta")
"""Entries of a card that come after those that define the figure."""


@dataclass
class Book:
    """The runs of a report."""

    runs: Sequence[Judged]

    def lines(self, series: Sequence[Series], axes: Axes, notes: object = None) -> Html:
        """A chart over all runs with its legend."""
        names = {s.slot: self.run_name(s.slot) for s in series}
        return self.chart(series, axes, names if len(self.runs) > 1 else {}, notes)

    def judged_lines(
        self, series: Sequence[Series], axes: Axes, *extra_notes: object, table: str = ""
    ) -> Html:
        """A chart of evaluated values.

        It is labelled if the protocol is not standard or the runs were evaluated on different
        images.
        """
        slots = [s.slot for s in series]
        names = {slot: self.judged_name(slot, table) for slot in slots}
        if len(self.runs) == 1:
            labels = {slot: self.label(slot, table) for slot in slots}
            names = {slot: label for slot, label in labels.items() if label is not None}
        notes = [*extra_notes]
        if differs := other_images([self.runs[slot] for slot in slots], table):
            notes.append(f"Not the same images: {'; '.join(differs)}")
        return self.chart(series, axes, names, join(*map(note, notes)))

    def chart(
        self, series: Sequence[Series], axes: Axes, names: Mapping[int, Html], notes: object
    ) -> Html:
        """A chart with the names of its curves, and a note."""
        return panel(axes.title, charts.lines(series, axes), legend(names.values()), notes)

    def run_name(self, slot: int) -> Html:
        return self.key(slot, self.runs[slot].name)

    def key(self, slot: int, name: str) -> Html:
        return tag("span", charts.key(slot), tag("span", name), class_="run")

    def judged_name(self, slot: int, table: str = "") -> Html:
        """The run's name where figures or tables of its record are shown."""
        return join(self.run_name(slot), " ", self.label(slot, table))

    def label(self, slot: int, table: str = "") -> Html | None:
        return badge(self.runs[slot].record.card_of("tables", table))


def number(figure: Figure, run: Judged, *, best: bool = False) -> Html:
    """A figure's value; hover, focus or tap shows its protocol card."""
    return carded(shown(figure), _card(figure, run), "number best" if best else "number")


def carded(words: str, card: object, class_: str) -> Html:
    """A word with a card that appears on hover, focus or tap."""
    button = tag("button", words, type="button", class_=class_)
    return join(button, tag("div", card, class_="card", role="note"))


def legend(keys: Iterable[object]) -> Html | None:
    items = [tag("li", key) for key in keys]
    return tag("ul", *items, class_="legend") if items else None


def badge(protocol: Mapping[str, Any]) -> Html | None:
    """The label of a protocol that is not the standard one."""
    if protocol.get("standard") is not False:
        return None
    return tag("span", "non-standard", class_="badge")


def panel(title: object, *parts: object) -> Html:
    """A chart or picture with its title."""
    return tag("figure", tag("figcaption", title), *parts)


def section(name: str, title: str, *parts: object) -> Html:
    return tag("section", tag("h2", title), *parts, id=name)


def note(*parts: object) -> Html:
    return tag("p", *parts, class_="note")


def settings(protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The entries of a protocol card in readable form; sizes in pixels as k/255."""
    rows = []
    for key, value in flat(protocol):
        words = key.replace("_", " ").replace(".", " ")
        text = str(value)
        if isinstance(value, float):
            text = f"{value:.6g}"
        if key.split(".")[0].endswith("_px") and isinstance(value, int | float):
            words, text = words.replace(" px", ""), f"{value:g}/255"
        rows.append((words, {"None": "none", "True": "yes", "False": "no"}.get(text, text)))
    return rows


def _card(figure: Figure, run: Judged) -> Html:
    interval = shown_interval(figure)
    top = [("value", shown(figure)), ("images", str(figure.n))]
    if interval:
        top.insert(1, ("95 % interval", interval))
    rest = [row for row in settings(figure.protocol) if row[0] != "images"]
    rest.sort(key=lambda row: row[0].startswith(LAST))
    rows = (join(tag("dt", key), tag("dd", value)) for key, value in (*top, *rest))
    title = tag("p", tag("b", figure.name), f" of {run.name} ", badge(figure.protocol))
    return join(title, tag("dl", *rows))
