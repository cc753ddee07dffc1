"""`jemkit report` and `jemkit compare`: figures and charts of one or several runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jemkit_cli.terminal import guarded, say, say_json, show_table

if TYPE_CHECKING:
    from jemkit.evaluation.compare import Comparison, Difference, Spread
    from jemkit.evaluation.run_table import Line

Runs = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Run folders, or folders with a record; the two newest runs by default.",
        metavar="[RUN]...",
    ),
]
RUNS = Path("runs")
LATEST = RUNS / "latest"


@guarded
def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders; the newest run by default.", metavar="[RUN]..."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; report.html in the first run's folder by default.",
                     show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """Write one HTML file with figures and charts of the runs; it works offline."""
    from jemkit.evaluation.report import write

    say(f"report {write(runs or [LATEST], out)}")


@guarded
def compare(
    runs: Runs = None,
    figure: Annotated[
        list[str] | None,
        typer.Option("--figure", help="Only this figure; repeatable.", metavar="NAME",
                     show_default=False),
    ] = None,
    seeds: Annotated[
        bool, typer.Option("--seeds", help="Mean +- deviation over runs that differ in their seed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:  # fmt: skip
    """Compare runs: their figures and, for two runs, paired differences over the same images."""
    from jemkit.evaluation.compare import compare as build_run
    from jemkit.evaluation.compare import newest

    comparison = build_run(runs or newest(RUNS), names=figure or (), seeds=seeds)
    if as_json:
        say_json(comparison.to_json())
        return
    _show_lines(comparison)
    _show_differences(comparison)
    _show_spreads(comparison)


def _show_lines(comparison: "Comparison") -> None:
    lines = [line for line in comparison.lines if any(line.figures) or not comparison.spreads]
    rows = [[line.column.title, *_cells(line)] for line in lines]
    show_table(["figure", *comparison.runs], rows)
    many = len(comparison.runs) > 1
    if many:
        say("* best; ~ non-standard protocol; ! protocols differ, not comparable")
    elif any("~" in cell for row in rows for cell in row):
        say("~ non-standard protocol")
    named: dict[str, list[str]] = {}
    for line in comparison.lines:
        for different in line.differs:
            named.setdefault(different, []).append(line.column.name)
    for different, names in named.items():
        say(f"! {different}: {', '.join(names)}")


def _why(comparison: "Comparison", name: str, why: str) -> str:
    """A reason, unless it is already given in the line of the figure."""
    differences = ["; ".join(line.differs) for line in comparison.lines if line.column.name == name]
    return "protocols differ, see above" if why in differences else why


def _cells(line: "Line") -> list[str]:
    from jemkit.evaluation.run_table import shown, shown_interval

    cells = []
    for at, figure in enumerate(line.figures):
        if figure is None:
            cells.append(f"-  ({line.why[at].split(';')[0]})")
            continue
        marks = "*" if at in line.best else ""
        marks += "~" if figure.protocol.get("standard") is False else ""
        marks += "!" if line.differs else ""
        interval = shown_interval(figure)
        text = f"{shown(figure)} [{interval}]" if interval else shown(figure)
        cells.append(f"{text} {marks}".rstrip())
    return cells


def _show_differences(comparison: "Comparison") -> None:
    if not comparison.differences:
        return
    rows = [[_named(d), *_difference(d)] for d in comparison.differences if not d.why]
    if rows:
        a, b = comparison.runs
        head = ["figure", f"{a} - {b}, points", "95 % interval", "images", "holds 0"]
        show_table(head, rows, "the same images, paired bootstrap")
    for difference in comparison.differences:
        if difference.why:
            why = _why(comparison, difference.name, difference.why)
            say(f"{_named(difference)}: no paired difference: {why}")


def _difference(difference: "Difference") -> list[str]:
    low, high = f"{100 * difference.low:+.2f}", f"{100 * difference.high:+.2f}"
    holds = "yes" if difference.holds_zero else "no"
    return [f"{100 * difference.mean:+.2f}", f"{low} to {high}", str(difference.n), holds]


def _named(row: "Difference | Spread") -> str:
    """A figure with the entries of its protocol that distinguish it from others of its name."""
    return f"{row.name}, {row.protocol}" if row.protocol else row.name


def _show_spreads(comparison: "Comparison") -> None:
    """Mean and deviation in the unit of the table above, by the settings that differ."""
    if not comparison.spreads:
        return
    keys = list(dict.fromkeys(key for spread in comparison.spreads for key in spread.settings))
    rows, above = [], None
    for spread in comparison.spreads:
        if spread.why:
            continue
        who = [str(spread.settings.get(key, "-")) for key in keys] or [", ".join(spread.runs)]
        seeds = ", ".join(map(str, spread.seeds))
        shown = [""] * len(who) if who == above else who
        rows.append([*shown, _named(spread), _spread(spread), seeds])
        above = who
    show_table([*(keys or ["runs"]), "figure", "mean +- deviation", "seeds"], rows, "over seeds")
    for spread in comparison.spreads:
        if spread.why:
            why = _why(comparison, spread.name, spread.why)
            say(f"{', '.join(spread.runs)}: no mean of {_named(spread)}: {why}")


def _spread(spread: "Spread") -> str:
    mean = f"{spread.mean:.2%}" if spread.share else f"{spread.mean:.4g}"
    if spread.sd is None:
        return mean
    return f"{mean} +- {spread.sd:.2%}" if spread.share else f"{mean} +- {spread.sd:.2g}"
