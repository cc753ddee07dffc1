"""The tables of a report and of a comparison, as they are read and as a program reads them."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jemkit.config.layers import flat
from jemkit.evaluation.report.tables import protocol_words
from jemkit.evaluation.run_table import Judged, Line, comparison, shown, shown_interval
from jemkit_cli.paper.tabular import Grid
from jemkit_cli.results import protocol_text

if TYPE_CHECKING:
    from jemkit.evaluation.compare import Comparison, Difference, Spread


def of_runs(runs: Sequence[Judged]) -> list[Grid]:
    """The tables of a report: the comparison, every figure, other images, the recipes."""
    grids = [compared([run.name for run in runs], comparison(runs)), figures(runs), ood(runs),
             recipes(runs)]  # fmt: skip
    return [grid for grid in grids if grid.rows]


def compared(names: Sequence[str], lines: Sequence[Line]) -> Grid:
    """Runs by figures; the best of a column is bold where the protocols agree."""
    lines = [line for line in lines if any(line.figures)]
    rows = [[name, *(_cell(line, slot) for line in lines)] for slot, name in enumerate(names)]
    bold = {(slot, at) for at, line in enumerate(lines, 1) for slot in line.best}
    notes = [f"{line.column.title} is not comparable: {'; '.join(line.differs)}"
             for line in lines if line.differs]  # fmt: skip
    data: list[Sequence[object]] = [
        ["run", "figure", "title", "value", "low", "high", "images", "standard", "best",
         "comparable"]
    ]  # fmt: skip
    for slot, name in enumerate(names):
        for line in lines:
            if (figure := line.figures[slot]) is not None:
                about = [figure.protocol.get("standard"), slot in line.best, not line.differs]
                value = [figure.value, figure.low, figure.high, figure.n]
                data.append([name, line.column.name, line.column.title, *value, *about])
    head = ["run", *(line.column.title for line in lines)]
    return Grid("comparison", head, rows, bold, notes, data)


def figures(runs: Sequence[Judged]) -> Grid:
    """Every figure with its interval and protocol."""
    rows: list[list[str]] = []
    data: list[Sequence[object]] = [["run", "figure", "value", "low", "high", "images", "protocol"]]
    for run in runs:
        for figure in run.record.figures:
            interval = shown_interval(figure) or "–"
            words = [run.name, figure.name, shown(figure), interval, str(figure.n)]
            rows.append([*words, protocol_text(figure)])
            card = json.dumps(figure.protocol, sort_keys=True, default=str)
            value = [figure.value, figure.low, figure.high, figure.n]
            data.append([run.name, figure.name, *value, card])
    head = ["run", "figure", "value", "95 % interval", "images", "protocol"]
    return Grid("figures", head, rows, data=data)


def ood(runs: Sequence[Judged]) -> Grid:
    """How well each score separates other images from those of the data set."""
    rows, data = [], []
    keys = ("auroc", "aupr", "fpr95", "n")
    for run in runs:
        for name, scores in sorted(run.record.tables.get("ood", {}).items()):
            for score, rates in sorted(scores.items()):
                values = [rates.get(key) for key in keys]
                data.append([run.name, name, score, *values])
                rows.append([run.name, name, score, *map(_short, values)])
    notes = [f"{run.name}: {protocol_words(run.record.card_of('tables', 'ood'))}" for run in runs]
    head = ["run", "images", "score", "AUROC", "AUPR", "FPR at 95 %", "n"]
    return Grid("ood", head, rows, notes=notes, data=[["run", "images", "score", *keys], *data])


def recipes(runs: Sequence[Judged]) -> Grid:
    """The settings in which the recipes differ; of one run, those that are not defaults."""
    every = [dict(flat(run.config.get("recipe", {}))) for run in runs]
    keys = sorted({key for recipe in every for key in recipe})
    if len(runs) == 1:
        origins = runs[0].config.get("origins", {})
        keys = [key for key in keys if origins.get(key) != "default"]
    else:
        keys = [k for k in keys if len({json.dumps(r.get(k), default=str) for r in every}) > 1]
    rows = [[key, *(_setting(recipe.get(key)) for recipe in every)] for key in keys]
    return Grid("recipe", ["option", *(run.name for run in runs)], rows)


def of_comparison(comparison: "Comparison") -> list[Grid]:
    """The tables that `jemkit compare` prints."""
    differences, spreads = paired(comparison), over_seeds(comparison)
    grids = [compared(comparison.runs, comparison.lines), differences, spreads]
    return [grid for grid in grids if grid.rows]


def paired(comparison: "Comparison") -> Grid:
    """Differences of two runs over the same images."""
    there = [d for d in comparison.differences if not d.why]
    title = " - ".join(comparison.runs)
    head = ["figure", f"{title}, points", "95 % interval", "images", "holds 0"]
    data: list[Sequence[object]] = [
        ["figure", "protocol", "mean", "low", "high", "images", "holds_zero"]
    ]
    data += [[d.name, d.protocol, d.mean, d.low, d.high, d.n, d.holds_zero] for d in there]
    return Grid("paired-differences", head, [_difference(d) for d in there], data=data)


def _difference(d: "Difference") -> list[str]:
    low, high = f"{100 * d.low:+.2f}", f"{100 * d.high:+.2f}"
    holds = "yes" if d.holds_zero else "no"
    return [named(d), f"{100 * d.mean:+.2f}", f"{low} to {high}", str(d.n), holds]


def named(row: "Difference | Spread") -> str:
    """A figure with the entries of its protocol that distinguish it from others of its name."""
    return f"{row.name}, {row.protocol}" if row.protocol else row.name


def over_seeds(comparison: "Comparison") -> Grid:
    """Mean and deviation in the unit of the comparison, by the settings that differ."""
    spreads = [spread for spread in comparison.spreads if not spread.why]
    keys = list(dict.fromkeys(key for s in comparison.spreads for key in s.settings))
    rows, data = [], []
    for spread in spreads:
        who = [str(spread.settings.get(key, "-")) for key in keys] or [", ".join(spread.runs)]
        seeds = ", ".join(map(str, spread.seeds))
        rows.append([*who, named(spread), _spread(spread), seeds])
        data.append([*who, spread.name, spread.protocol, spread.mean, spread.sd, seeds])
    who_head = keys or ["runs"]
    head = [*who_head, "figure", "mean +- deviation", "seeds"]
    top = [*who_head, "figure", "protocol", "mean", "sd", "seeds"]
    return Grid("seeds", head, rows, data=[top, *data])


def _spread(spread: "Spread") -> str:
    mean = f"{spread.mean:.2%}" if spread.share else f"{spread.mean:.4g}"
    if spread.sd is None:
        return mean
    return f"{mean} +- {spread.sd:.2%}" if spread.share else f"{mean} +- {spread.sd:.2g}"


def _cell(line: Line, slot: int) -> str:
    figure = line.figures[slot]
    if figure is None:
        return "–"
    interval = shown_interval(figure).replace(" to ", ", ").removesuffix(" %")
    text = f"{shown(figure)} [{interval}]" if interval else shown(figure)
    text += " ~" if figure.protocol.get("standard") is False else ""
    return f"{text} ≠" if line.differs else text


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
