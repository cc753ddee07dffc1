"""A study's table as Markdown, LaTeX, CSV and JSON, and its figure as SVG."""

import json
from collections.abc import Callable
from pathlib import Path

from jemkit.evaluation.run_table import COLUMNS
from jemkit.runtime.files import write_text
from jemkit_cli.paper import tabular
from jemkit_cli.results import protocol_text
from jemkit_cli.study.drawing import drawing
from jemkit_cli.study.table import Cell, Line, Table

TITLES = {column.name: column.title for column in COLUMNS} | {
    "gap_relative": "Gap / sd E(x)", "gap_variance": "Gap, variance", "nll": "NLL", "pgd": "PGD",
}  # fmt: skip


def write_all(table: Table, folder: Path, name: str) -> list[Path]:
    """NAME.md, NAME.tex, NAME.csv and NAME.json; NAME.svg if the study has a figure."""
    formats: dict[str, Callable[[Table], str]] = {
        "md": lambda table: markdown(table, name), "tex": latex, "csv": comma_separated,
        "json": lambda table: json.dumps(table.to_json(), indent=1) + "\n",
    }  # fmt: skip
    if table.study.figure is not None:
        formats["svg"] = lambda table: drawing(table, column_title)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, form in formats.items():
        paths.append(folder / f"{name}.{suffix}")
        write_text(paths[-1], form(table))
    return paths


def heads(table: Table) -> list[str]:
    """The titles of the columns that `cells` fills."""
    titles = [column_title(name) for name in table.study.columns]
    compared = column_title(table.study.compared)
    more = [f"{compared} less {table.study.reference}"] if table.study.reference else []
    return ["method", *titles, *more, "seconds", *(f"{title}, paper" for title in _paper(table))]


def cells(table: Table, line: Line) -> list[str]:
    """A line as text."""
    texts = [_text(line, name) for name in table.study.columns]
    if table.study.reference:
        texts.append("" if line.difference is None else _points(line.difference))
    seconds = sum(line.seconds) / len(line.seconds) if line.seconds else None
    texts.append("" if seconds is None else f"{seconds:.0f}")
    published = [line.paper.get(name) for name in _paper(table).values()]
    return [line.name, *texts, *("" if value is None else f"{value:g}" for value in published)]


def markdown(table: Table, name: str = "figure") -> str:
    """The table with its protocol below, and the figure of a file NAME.svg above."""
    top = heads(table)
    rows = [f"| {' | '.join(top)} |", f"|{'---|' * len(top)}"]
    rows += [f"| {' | '.join(cells(table, line))} |" for line in table.lines]
    notes = [f"- {note}" for note in footnotes(table)]
    figure = [] if table.study.figure is None else [f"![{table.study.title}]({name}.svg)", ""]
    return "\n".join([f"# {table.study.title}", "", *figure, *rows, "", *notes, ""])


def latex(table: Table) -> str:
    """A tabular of booktabs with its protocol as comments."""
    rows = [cells(table, line) for line in table.lines]
    return tabular.latex(heads(table), rows, footnotes(table))


def comma_separated(table: Table) -> str:
    """One line for each row, figure and seed, with the hash of the weights."""
    rows: list[list[object]] = [
        ["row", "figure", "run", "checkpoint", "value", "mean", "sd", "low", "high"]
    ]
    for line in table.lines:
        for name, cell in line.cells.items():
            spread = [cell.mean, cell.sd, cell.low, cell.high]
            for run, checkpoint, value in zip(
                line.runs, line.checkpoints, cell.values, strict=True
            ):
                rows.append([line.name, name, run, checkpoint, value, *spread])
    return tabular.comma_separated(rows)


def footnotes(table: Table) -> list[str]:
    """Notes on the figures: seeds, intervals, and the protocol of each column."""
    seeds = ", ".join(map(str, table.study.seeds))
    several = len(table.study.seeds) > 1
    spread = (
        "[a, b] is a 95 % bootstrap interval over seeds and images; +- is the standard deviation "
        "over seeds" if several else "[a, b] is the 95 % interval over images"
    )  # fmt: skip
    notes = [f"Means over the seeds {seeds}. {spread}." if several else f"Seed {seeds}. {spread}."]
    if table.study.settings:
        notes.append(f"Every row with {', '.join(table.study.settings)}.")
    if any(line.by_seed for line in table.lines):
        notes.append(
            "a / b are the figures of the seeds, whose protocols differ: they have no mean"
        )
    for name, figure in table.protocols.items():
        keys = table.apart.get(name)
        rest = f"; between rows or seeds these differ: {', '.join(keys)}" if keys else ""
        notes.append(f"{column_title(name)}: {protocol_text(figure)}{rest}")
    if table.protocols:
        first = next(iter(table.protocols.values()))
        versions = (f"{name} {version}" for name, version in first.protocol["versions"].items())
        notes.append(", ".join(versions))
    if _paper(table):
        notes.append(
            f"The paper's figures are its own, not measured here. {table.study.paper}".strip()
        )
    for line in table.lines:
        row = table.study.row(line.name)
        if row.protocol:
            notes.append(f"{line.name}, the paper's figures: {row.protocol}")
        if row.missing:
            notes.append(f"{line.name} is not measured: {row.missing}")
        if line.diverged:
            notes.append(f"{line.name}: {line.diverged} of {len(table.study.seeds)} seeds diverged")
    return notes


def column_title(name: str) -> str:
    """AUROC, uniform of auroc/uniform; a figure that has no title keeps its name."""
    stem, _, rest = name.partition("/")
    title = TITLES.get(stem, stem)
    return f"{title}, {rest}" if rest else title


def _paper(table: Table) -> dict[str, str]:
    """Titles and names of the columns for which the paper has a figure."""
    names = dict.fromkeys(name for line in table.lines for name in line.paper)
    return {column_title(name): name for name in names}


def _text(line: Line, name: str) -> str:
    cell = line.cells.get(name)
    if cell is not None:
        return _shown(cell)
    if name in line.by_seed:
        return " / ".join(map(_shown, line.by_seed[name]))
    if line.diverged and not line.runs:
        return "diverged"
    return "–" if line.why[name] == "left out" else ""


def _shown(cell: Cell) -> str:
    if not cell.share:
        return f"{cell.mean:.3g}" if cell.sd is None else f"{cell.mean:.3g} +- {cell.sd:.2g}"
    value = f"{100 * cell.mean:.1f} %"
    if cell.low is not None and cell.high is not None:
        return f"{value} [{100 * cell.low:.1f}, {100 * cell.high:.1f}]"
    return value if cell.sd is None else f"{value} +- {100 * cell.sd:.1f}"


def _points(cell: Cell) -> str:
    bounds = [f"{100 * bound:+.1f}" for bound in (cell.low, cell.high) if bound is not None]
    return f"{100 * cell.mean:+.1f} [{', '.join(bounds)}]"
