"""The sections of a report with tables."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jemkit.config.layers import flat
from jemkit.evaluation.report import plots
from jemkit.evaluation.report.book import (
    Book,
    badge_of,
    carded,
    note,
    number,
    section,
    settings,
)
from jemkit.evaluation.run_table import Judged, Line, comparison, shown_interval, stem_of
from jemkit.metrics.figures import Figure
from jemkit.metrics.record_file import beside
from jemkit.runtime.html import Html, coded, join, table, tag

MOST = 8
"""Columns of the comparison that fit on a page of 1100 px, beside the names of the runs."""

ABOUT = {
    "clean": "Accuracy on clean images; higher is better",
    "aa": "Accuracy under AutoAttack; higher is better",
    "pgd20": "Accuracy under PGD of 20 steps; higher is better",
    "fid": "Fréchet distance of generated images to real ones; lower is better",
    "fd": "Fréchet distance in another network's features; lower is better",
    "gap": "Mean |E(x~) - E(x)|; lower is better, and it grows with the scale of the logits",
    "ece": "Expected calibration error; lower is better",
    "auroc": "In-distribution against other images; higher is better",
}


def overview(book: Book) -> Html:
    """The comparison: all runs, the main figures, the best of each marked."""
    lines = comparison(book.runs)
    whole = [_compared(book, part) for part in _fitting(lines)]
    notes = [
        note(tag("b", line.column.title), " is not comparable: ", "; ".join(line.differs))
        for line in lines
        if line.differs
    ]
    about = "Hover over, focus or tap a figure to see its protocol."
    if len(book.runs) > 1:
        about += " Bold and underlined: the best of a column."
    return section("comparison", "Comparison", *whole, *notes, note(about))


def _fitting(lines: Sequence[Line]) -> list[Sequence[Line]]:
    """The columns of each table, so many as fit on a page; AUROC begins a table of its own."""
    ood = [line for line in lines if stem_of(line.column.name) == "auroc"]
    groups = [[line for line in lines if line not in ood], ood] if len(lines) > MOST else [lines]
    return [group[at : at + MOST] for group in groups for at in range(0, len(group), MOST)]


def _compared(book: Book, lines: Sequence[Line]) -> Html:
    """A table of all runs with these columns."""
    head = [_head("Run")]
    head += [_head(line.column.title, ABOUT.get(stem_of(line.column.name))) for line in lines]
    rows = [
        [book.run_name(slot), *(_figure(book, line, slot) for line in lines)]
        for slot in range(len(book.runs))
    ]
    return table(head, rows, "sortable figures")


def cautions(book: Book) -> Html | None:
    """Warnings of each run, and what was omitted and why."""
    parts = []
    for slot, run in enumerate(book.runs):
        items = [tag("li", coded(warning)) for warning in run.record.warnings]
        items += [tag("li", words) for words in _measured_otherwise(run)]
        items += [
            tag("li", tag("b", name), " was left out: ", coded(why))
            for name, why in sorted(run.record.left_out.items())
        ]
        if items:
            parts.append(join(tag("h3", book.run_name(slot)), tag("ul", *items, class_="notes")))
    return section("warnings", "Warnings", *parts) if parts else None


def indicators(book: Book) -> Html | None:
    """Failure indicators: evidence that an attack's figure is too high."""
    parts = []
    for slot, run in enumerate(book.runs):
        for stored in run.record.named("tables", "indicators"):
            card = run.record.card_of("tables", stored)
            words = "" if stored == "indicators" else f", {protocol_words(card)}"
            for attack, findings in sorted(run.record.tables[stored].items()):
                name = book.judged_name(slot, stored)
                parts.append(_verdict(name, f"{attack}{words}", findings))
    if not parts:
        return None
    about = note("A flag means that the attack may have failed and the accuracy is too high.")
    return section("indicators", "Failure indicators", about, *parts)


def ood(book: Book) -> Html | None:
    """How well each score separates other images from those of the data set."""
    rows: list[list[object]] = []
    for slot, run in enumerate(book.runs):
        for name, scores in sorted(run.record.tables.get("ood", {}).items()):
            for score, rates in sorted(scores.items()):
                values = [_value(rates.get(key)) for key in ("auroc", "aupr", "fpr95", "n")]
                rows.append([book.judged_name(slot, "ood"), name, score, *values])
    if not rows:
        return None
    head = map(_head, ("Run", "Images", "Score", "AUROC", "AUPR", "FPR at 95 %", "n"))
    return section("ood", "Out-of-distribution", table([*head], rows, "sortable"), plots.ood(book))


def recipe(book: Book) -> Html | None:
    """The differences between the runs' recipes; for one run, from the defaults."""
    recipes = [dict(flat(run.config.get("recipe", {}))) for run in book.runs]
    keys = sorted({key for recipe in recipes for key in recipe})
    if not keys:
        return None
    if len(book.runs) == 1:
        origins = book.runs[0].config.get("origins", {})
        rows = [
            [tag("code", key), _json(recipes[0][key]), str(origins.get(key, "unknown"))]
            for key in keys
            if origins.get(key) != "default"
        ]
        whole = table(["Option", "Value", "Where it comes from"], rows)
        return section("recipe", "Recipe, where it is not the default", whole)
    rows = [
        [tag("code", key), *(_json(recipe[key]) if key in recipe else "–" for recipe in recipes)]
        for key in keys
        if len({json.dumps(recipe.get(key, "–"), sort_keys=True) for recipe in recipes}) > 1
    ]
    title = "In what the recipes differ"
    if not rows:
        return section("recipe", title, note("There are none: the recipes are the same."))
    names = [book.run_name(slot) for slot in range(len(book.runs))]
    return section("recipe", title, table(["Option", *names], rows))


def every_figure(book: Book) -> Html:
    """All figures with their protocols in words, for printing."""
    rows: list[list[object]] = []
    for slot, run in enumerate(book.runs):
        for figure in run.record.figures:
            value = join(number(figure, run), " ", badge_of(figure.protocol))
            first_cells = [book.run_name(slot), figure.name, _cell(value, figure.value)]
            rows.append([*first_cells, shown_interval(figure) or "–", figure.n, _words(figure)])
    head = map(_head, ("Run", "Figure", "Value"))
    whole = table([*head, "95 % interval", "n", "Protocol"], rows, "sortable")
    summary = tag("summary", f"{len(rows)} figures with their protocols")
    return section("figures", "Every figure", tag("details", summary, whole))


def _measured_otherwise(run: Judged) -> list[str]:
    """Tables that exist with several protocols; charts show only the preferred one."""
    notes = []
    for name in ("radius_curve", "energies", "reliability", "ood"):
        stored = run.record.named("tables", name)
        if len(stored) > 1:
            words = protocol_words(run.record.card_of("tables", stored[0]))
            notes.append(
                f"{name} was measured with {len(stored)} protocols; shown is that of {words}"
            )
    stems = beside(run.folder)
    if stems:
        notes.append(f"there are also records of other models or images: {', '.join(stems)}")
    return notes


def protocol_words(card: Mapping[str, Any]) -> str:
    """A protocol in a few words: norm, radius, images, seed."""
    radius = card.get("radius_px")
    words = [f"{card.get('norm')} {radius:g}/255"] if isinstance(radius, int | float) else []
    words += [f"{card[key]} {key}" if key == "images" else f"{key} {card[key]}"
             for key in ("images", "seed") if key in card]  # fmt: skip
    return ", ".join(words)


def _figure(book: Book, line: Line, slot: int) -> Html:
    figure = line.figures[slot]
    if figure is None:
        return tag("td", carded("–", line.why[slot], "dash"))
    value = number(figure, book.runs[slot], best=slot in line.best)
    mark = tag("span", "≠", class_="differs", title="; ".join(line.differs), role="img",
               aria_label="protocols differ")  # fmt: skip
    interval = tag("small", shown_interval(figure)) if figure.low is not None else None
    return _cell(
        join(value, mark if line.differs else None, interval, badge_of(figure.protocol)),
        figure.value,
    )


def _cell(content: Html, value: float) -> Html:
    """A cell that is sorted by its value; non-finite values come last."""
    return tag("td", content, data_value=repr(value) if math.isfinite(value) else None)


def _head(title: str, about: str | None = None) -> Html:
    """The head of a column that a click sorts by."""
    sorter = tag("button", title, type="button", class_="sort")
    return tag("th", sorter, scope="col", title=about)


def _verdict(run: Html, attack: str, findings: list[dict[str, Any]]) -> Html:
    flagged = sum(bool(row.get("flag")) for row in findings)
    count = f"{flagged} of {len(findings)} flagged"
    chip = tag("span", count, class_="badge" if flagged else "fine")
    flag = tag("span", "flag", class_="badge")
    words = ("found", "means", "do")
    rows = [
        [
            row.get("name", ""),
            flag if row.get("flag") else "clear",
            *(row.get(k, "") for k in words),
        ]
        for row in findings
    ]
    whole = table(["Indicator", "", "Found", "What it means", "What to do"], rows, "wordy")
    summary = tag("summary", run, " ", attack, " ", chip)
    return tag("details", summary, whole, open=bool(flagged))


def _value(value: Any) -> Html:
    if not isinstance(value, int | float):
        return tag("td", "–")
    return _cell(join(f"{value:.4g}" if isinstance(value, float) else str(value)), float(value))


def _json(value: Any) -> Html:
    return tag("code", json.dumps(value, ensure_ascii=False))


def _words(figure: Figure) -> Html:
    skip = ("versions", "checkpoint", "evaluator")
    rows = [(k, v) for k, v in settings(figure.protocol) if not k.startswith(skip)]
    return tag("td", ", ".join(f"{key} {value}" for key, value in rows), class_="words")
