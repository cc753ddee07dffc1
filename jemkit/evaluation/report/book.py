"""Code shared by the sections of a report: runs, figures with protocol cards, charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jemkit.config.layers import flat
from jemkit.evaluation.run_table import Judged, other_images, shown, shown_interval
from jemkit.metrics import charts
from jemkit.metrics.charts import Axes, Key, Panel, Series
from jemkit.metrics.figures import Figure
from jemkit.runtime.html import Html, join, tag

LAST = ("checkpoint", "device", "evaluator", "versions", "seconds", "max delta")
"""Entries of a card that come after those that define the figure."""


UNDRAWABLE = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""Errors of a table in a form that this version does not know."""
SHORT = 30
"""Characters of a run's name that a report shows; the whole name is its title."""


@dataclass
class Book:
    """The runs of a report."""

    runs: Sequence[Judged]

    @cached_property
    def names(self) -> list[str]:
        """The names of the runs, shortened where that keeps them distinct."""
        short = [shortened(run.name) for run in self.runs]
        return [
            run.name if short.count(name) > 1 else name
            for run, name in zip(self.runs, short, strict=True)
        ]

    def lines(self, name: str, series: Sequence[Series], axes: Axes, *notes: str) -> Panel:
        """A chart over all runs, with their legend if there are several."""
        keys = [self.legend_key(s) for s in series] if len(self.runs) > 1 else []
        return Panel(axes.title, charts.lines(series, axes), keys, name, notes=notes)

    def judged_lines(
        self, name: str, series: Sequence[Series], axes: Axes, *notes: str, table: str = ""
    ) -> Panel:
        """A chart of evaluated values.

        It is labelled if the protocol is not standard or the runs were evaluated on different
        images.
        """
        slots = [s.slot for s in series]
        labels = {slot: self.label(slot, table) for slot in slots}
        if differs := other_images([self.runs[slot] for slot in slots], table):
            notes = (*notes, f"Not the same images: {'; '.join(differs)}")
        panel = self.lines(name, series, axes, *notes)
        if len(self.runs) == 1:
            return panel._replace(label=next(iter(labels.values()), ""))
        keys = [self.legend_key(s)._replace(label=labels[s.slot]) for s in series]
        return panel._replace(legend=keys)

    def legend_key(self, series: Series) -> Key:
        """The legend's entry of a curve of a run."""
        name, full = self.names[series.slot], self.runs[series.slot].name
        return Key(charts.key(series.slot, marked=series.marked), name, full)

    def run_name(self, slot: int) -> Html:
        name, full = self.names[slot], self.runs[slot].name
        words = tag("span", name, title=full if name != full else None)
        return tag("span", charts.key(slot), words, class_="run")

    def judged_name(self, slot: int, table: str = "") -> Html:
        """The run's name where figures or tables of its record are shown."""
        return join(self.run_name(slot), " ", badge(self.label(slot, table)))

    def label(self, slot: int, table: str = "") -> str:
        """The label of a protocol that is not the standard one, else nothing."""
        return label_of(self.runs[slot].record.card_of("tables", table))


def shortened(name: str) -> str:
    """A name of at most SHORT characters, with its end: runs of a study differ there."""
    return name if len(name) <= SHORT else f"{name[: SHORT - 13]}…{name[-12:]}"


def number(figure: Figure, run: Judged, *, best: bool = False) -> Html:
    """A figure's value; hover, focus or tap shows its protocol card."""
    return carded(shown(figure), _card(figure, run), "number best" if best else "number")


def carded(words: str, card: object, class_: str) -> Html:
    """A word with a card that appears on hover, focus or tap."""
    button = tag("button", words, type="button", class_=class_)
    return join(button, tag("div", card, class_="card", role="note"))


def drawn(panel: Panel) -> Html:
    """A chart with its title, legend and notes."""
    title = join(panel.title, " ", badge(panel.label))
    items = [
        tag("li", tag("span", sign, " ", tag("span", words, title=full if full != words else None)),
            " ", badge(label))
        for sign, words, full, label in panel.legend
    ]  # fmt: skip
    legend = tag("ul", *items, class_="legend") if items else None
    return captioned(title, panel.chart, legend, *map(note, panel.notes))


def label_of(protocol: Mapping[str, Any]) -> str:
    return "non-standard" if protocol.get("standard") is False else ""


def badge(label: str) -> Html | None:
    """The label of a protocol that is not the standard one."""
    return tag("span", label, class_="badge") if label else None


def badge_of(protocol: Mapping[str, Any]) -> Html | None:
    return badge(label_of(protocol))


def captioned(title: object, *parts: object) -> Html:
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
    title = tag("p", tag("b", figure.name), f" of {run.name} ", badge_of(figure.protocol))
    return join(title, tag("dl", *rows))
