"""Keeps the rows of a study as they are measured, and continues the study on another machine.

    python benchmarks/keep_records.py runs/cifar10-small/table2.json
    python benchmarks/keep_records.py --continue runs/cifar10-small

The first call writes the measured rows of the table into benchmarks/results/FOLDER-STUDY.json, and
leaves its other rows as they are. The second copies the models of examples/models whose best epoch
the study evaluates into its folder, as trained runs: `jemkit reproduce` evaluates them, compares
with them and starts from them, and trains the others.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from jemkit.runtime.files import read_json, write_json
from jemkit_cli.study.running import MARK

ROOT = Path(__file__).parents[1]
RESULTS, MODELS = ROOT / "benchmarks" / "results", ROOT / "examples" / "models"
SAME = ("seeds", "columns", "reference", "compared", "settings", "protocols_differ_in")
"""What two parts of a table must agree in."""
NOTE = "Runs trained and evaluated beside other programs: the seconds are upper bounds."


def merged(before: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]:
    """The record with the measured rows of `part` in place of its own."""
    rows = [{**row, "runs": [Path(run).name for run in row["runs"]]}
            for row in part["rows"] if row["cells"]]  # fmt: skip
    if before is None:
        return {**part, "rows": rows, "note": NOTE}
    for name in SAME:
        there = before.get(name, [])  # records of before `settings` have none
        if there != part[name]:
            raise SystemExit(f"error: {name} is {there} in the record and {part[name]} here")
    measured = {row["name"] for row in rows}
    others = [row for row in before["rows"] if row["name"] not in measured]
    return {**before, "settings": part["settings"], "rows": [*others, *rows]}


def keep(table: Path) -> Path:
    """Merge the table of a study into its record."""
    path = RESULTS / f"{table.parent.name}-{table.stem}.json"
    before = read_json(path) if path.exists() else None
    path.write_text(json.dumps(merged(before, read_json(table)), indent=1) + "\n")
    return path


def continued(out: Path, record: dict[str, Any]) -> list[Path]:
    """Copy the models of the record's rows into the study's folder, as runs not evaluated yet."""
    rows = record["rows"]
    seconds = {run: row["seconds"][at] for row in rows for at, run in enumerate(row["runs"])}
    copied = []
    for config in sorted(MODELS.glob("*/config.json")):
        source = read_json(config)["source"]
        if source["checkpoint"] == "best" and source["run"] in seconds:
            folder = shutil.copytree(config.parent, out / source["run"])
            write_json(folder / MARK, {"trained": {"seconds": seconds[source["run"]]}})
            copied.append(folder)
    return copied


if __name__ == "__main__":
    if sys.argv[1] == "--continue":
        folder = Path(sys.argv[2])
        record = read_json(RESULTS / f"{folder.name}-table2.json")
        print(*continued(folder, record), sep="\n")
    else:
        print(keep(Path(sys.argv[1])))
