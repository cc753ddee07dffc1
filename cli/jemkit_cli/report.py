"""`jemkit report` and `jemkit compare`: figures and charts of one or several runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jemkit_cli.printable import printable
from jemkit_cli.terminal import guarded, say, say_json, show_table

if TYPE_CHECKING:
    from jemkit.evaluation.compare import Comparison
    from jemkit.evaluation.report.book import Book
    from jemkit.evaluation.run_table import Line
    from jemkit_cli.paper.tabular import Grid

Runs = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Run folders, or folders with a record; the two newest runs by default.",
        metavar="[RUN]...",
    ),
]
RUNS = Path("runs")
LATEST = RUNS / "latest"


Figures = Annotated[
    Path | None,
    typer.Option(
        "--figures",
        help="Also write every figure as PDF and SVG, and every table as LaTeX and CSV, there.",
        metavar="FOLDER",
        show_default=False,
    ),
]


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
    figures: Figures = None,
) -> None:  # fmt: skip
    """Write one HTML file with figures and charts of the runs; it works offline."""
    from jemkit.evaluation.report import read_book, write

    folders = runs or [LATEST]
    say(f"report {write(folders, out)}")
    if figures is not None:
        from jemkit_cli.paper import grids

        book = read_book(folders)
        _write(book, grids.of_runs(book.runs), figures)


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
    figures: Figures = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:  # fmt: skip
    """Compare runs: their figures and, for two runs, paired differences over the same images."""
    from jemkit.evaluation.compare import compare as compare_runs
    from jemkit.evaluation.compare import newest

    folders = runs or newest(RUNS)
    comparison = compare_runs(folders, names=figure or (), seeds=seeds)
    if as_json:
        say_json(comparison.to_json())
    else:
        _show_lines(comparison)
        _show_differences(comparison)
        _show_spreads(comparison)
    if figures is not None:
        from jemkit.evaluation.report import read_book
        from jemkit_cli.paper import grids

        _write(read_book(folders), grids.of_comparison(comparison), figures, silent=as_json)


def _write(book: "Book", grids: "Sequence[Grid]", folder: Path, *, silent: bool = False) -> None:
    from jemkit_cli.paper.writing import write_all

    written = write_all(book, grids, folder)
    for note in written.notes:
        typer.echo(printable(f"note: {note}"), err=True)
    if not silent:
        say(f"figures {folder}: {len(written.paths)} files")


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
    from jemkit_cli.paper.grids import named, paired

    table = paired(comparison)
    if table.rows:
        show_table(table.head, table.rows, "the same images, paired bootstrap")
    for difference in comparison.differences:
        if difference.why:
            why = _why(comparison, difference.name, difference.why)
            say(f"{named(difference)}: no paired difference: {why}")


def _show_spreads(comparison: "Comparison") -> None:
    """Mean and deviation over seeds; the settings are shown once."""
    if not comparison.spreads:
        return
    from jemkit_cli.paper.grids import named, over_seeds

    table = over_seeds(comparison)
    rows, above = [], None
    for row in table.rows:
        who = row[:-3]
        rows.append([*([""] * len(who) if who == above else who), *row[-3:]])
        above = who
    show_table(table.head, rows, "over seeds")
    for spread in comparison.spreads:
        if spread.why:
            why = _why(comparison, spread.name, spread.why)
            say(f"{', '.join(spread.runs)}: no mean of {named(spread)}: {why}")
