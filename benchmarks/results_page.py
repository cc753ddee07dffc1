"""Writes the tables of docs/ from the records of `jemkit reproduce`.

    python benchmarks/results_page.py

The JSON of a study is kept as benchmarks/results/SCALE-STUDY.json; `benchmarks` is the scale of the
studies that are files in benchmarks. What it does not have yet is shown by the published figures
alone. A table stands between two comments that name it; nothing else is changed.
"""

import json
import re
from pathlib import Path
from typing import Any

from jemkit.config.registry import installed
from jemkit_cli.study.plan import Row, Study, find_study, read_study
from jemkit_cli.study.table import Cell, Line, Table
from jemkit_cli.study.writing import cells, heads

ROOT = Path(__file__).parents[1]
PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in ("results", "digits", "cifar10"))
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
EMPTY = "not measured yet"
OWN = "benchmarks"


def table_of(study: Study, record: dict[str, Any] | None) -> Table:
    """The table of a record; rows that it lacks have the published figures alone."""
    if record is not None:
        named = ("seeds", "columns", "reference", "compared", "title", "paper")
        study = study.model_copy(update={name: record[name] for name in named})
    measured = {row["name"]: _line(row) for row in record["rows"]} if record else {}
    return Table(study, [measured.get(row.name) or _empty(row, study) for row in study.rows])


def _empty(row: Row, study: Study) -> Line:
    return Line(
        name=row.name, runs=[], checkpoints=[], seconds=[], cells={}, by_seed={},
        why=dict.fromkeys(study.columns, ""), difference=None, diverged=0, paper=row.paper,
    )  # fmt: skip


def markdown(name: str, scale: str) -> str:
    """The rows of a table, and where its record is or how to write it."""
    path = RESULTS / f"{scale}-{name}.json"
    record = json.loads(path.read_text()) if path.exists() else None
    table = table_of(_study(name, scale), record)
    top = heads(table)
    rows = [f"| {' | '.join(top)} |", f"|{'---|' * len(top)}"]
    for line in table.lines:
        texts = cells(table, line)
        if record is None or line.name not in {row["name"] for row in record["rows"]}:
            texts[1] = EMPTY
        rows.append(f"| {' | '.join(texts)} |")
    seeds = ", ".join(map(str, table.study.seeds))
    own = f"benchmarks/{name}.toml" if scale == OWN else f"{name} --scale {scale}"
    source = f"`jemkit reproduce {own}` measures it."
    if record is not None:
        link = f"[{path.name}](../benchmarks/results/{path.name})"
        source = f"Seeds {seeds}; protocols and hashes: {link}. {record.get('note', '')}".strip()
    paper = f" Paper: {table.study.paper}" if table.study.paper else ""
    return "\n".join([*rows, "", f"{source}{paper}", ""])


def _study(name: str, scale: str) -> Study:
    if scale == OWN:
        path = ROOT / "benchmarks" / f"{name}.toml"
        return read_study(path, path.name)
    return find_study(installed(third_party=False), name, scale)


def page(text: str) -> str:
    """The page with every table as it is now."""
    return PLACE.sub(lambda m: f"{m[1]}\n{markdown(m[2], m[3])}\n{m[4]}", text)


def _line(row: dict[str, Any]) -> Line:
    figures = {name: Cell(**cell) for name, cell in row["cells"].items()}
    apart = row.get("by_seed", {})
    by_seed = {name: [Cell(**cell) for cell in each] for name, each in apart.items()}
    difference = Cell(**row["difference"]) if row["difference"] else None
    return Line(**{**row, "cells": figures, "by_seed": by_seed, "difference": difference})


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text()))
