"""benchmarks/keep_records.py merges the rows of a table, and copies shipped models as runs."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jemkit.config.registry import installed
from jemkit_cli.study.plan import Row, Unit, find_study, part_of, study_resolver, units
from jemkit_cli.study.running import state_of

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "keep_records.py"))
RECORD = json.loads((ROOT / "benchmarks" / "results" / "cifar10-small-table2.json").read_text())
SHARED = dict.fromkeys(SCRIPT["SAME"])
names = st.lists(st.sampled_from("abcd"), unique=True)


def table(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {**SHARED, "rows": [
        {"name": name, "runs": [f"/runs/{name}"], "cells": cells} for name, cells in rows.items()
    ]}  # fmt: skip


@given(before=names, part=names, measured=st.sets(st.sampled_from("abcd")))
def test_measured_rows_replace_theirs_and_others_stay(
    before: list[str], part: list[str], measured: set[str]
) -> None:
    first = SCRIPT["merged"](None, table({name: {"clean": 1} for name in before}))
    second = table({name: {"clean": 2} if name in measured else {} for name in part})
    rows = SCRIPT["merged"](first, second)["rows"]
    new = set(part) & measured
    assert len(rows) == len({row["name"] for row in rows})
    assert {row["name"]: row["cells"]["clean"] for row in rows} == {
        **dict.fromkeys(before, 1), **dict.fromkeys(new, 2)
    }  # fmt: skip
    assert all(row["runs"] == [row["name"]] for row in rows)


def test_tables_of_two_studies_are_not_merged() -> None:
    with pytest.raises(SystemExit, match="seeds"):
        SCRIPT["merged"]({**table({}), "seeds": [1]}, table({}))
    before = {name: value for name, value in table({}).items() if name != "settings"}
    with pytest.raises(SystemExit, match="settings"):
        SCRIPT["merged"](before, {**table({}), "settings": ["run.precision=fp32"]})


def test_shipped_models_continue_a_study_as_runs(tmp_path: Path) -> None:
    copied = SCRIPT["continued"](tmp_path, RECORD)
    assert {"pgd-at-0-59880c76", "eb-jdat-sada-jem-squared-0-4f9e5d3e"} <= {p.name for p in copied}
    for folder in copied:
        unit = Unit(Row(name="a"), 0, None, "", folder)  # type: ignore[arg-type]
        (row,) = (row for row in RECORD["rows"] if folder.name in row["runs"])
        state = state_of(unit)
        assert state.trained == {"seconds": row["seconds"][0]}
        assert state.missing([("-q",)]) == [("-q",)]
    study = find_study(installed(), "table2", "cifar10-small")
    rows = part_of(study, (), ["PGD-AT", "DAT, after PGD-AT"])
    planned = units(rows, installed(), tmp_path, study_resolver(rows, installed(), {}))
    assert {unit.folder for unit in planned} <= set(copied)
