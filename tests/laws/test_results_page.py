"""docs/results.md and docs/digits.md have the tables that `jemkit reproduce` recorded."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "results_page.py"))


def test_the_page_is_the_one_that_the_records_give(script: dict[str, Any]) -> None:
    for path in script["PAGES"]:
        text = path.read_text()
        assert "<!-- table: " in text
        assert script["page"](text) == text, "run python benchmarks/results_page.py"


def test_a_table_without_a_record_has_the_papers_figures_alone(script: dict[str, Any]) -> None:
    if (ROOT / "benchmarks" / "results" / "cifar10-table2.json").exists():
        pytest.skip("it is measured")
    rows = script["markdown"]("table2", "cifar10").splitlines()
    (line,) = (row for row in rows if row.startswith("| VART |"))
    assert line == "| VART | not measured yet |  |  |  |  | 84.21 | 58.32 | 54.24 |"


def test_rows_that_a_record_lacks_have_the_papers_figures_alone(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.loads((ROOT / "benchmarks" / "results" / "digits-table2.json").read_text())
    part = {**whole, "rows": [row for row in whole["rows"] if row["name"] != "MART"]}
    (tmp_path / "digits-table2.json").write_text(json.dumps(part))
    before = script["markdown"]("table2", "digits").splitlines()
    monkeypatch.setitem(script["markdown"].__globals__, "RESULTS", tmp_path)
    after = script["markdown"]("table2", "digits").splitlines()
    (changed,) = (row for row in after if row not in before)
    assert changed.startswith("| MART | not measured yet |")
    assert len(after) == len(before)


def test_text_beside_the_tables_stays(script: dict[str, Any]) -> None:
    text = "before\n<!-- table: table2 cifar10 -->\nold\n<!-- end -->\nafter\n"
    new = script["page"](text)
    assert new.startswith("before\n<!-- table: table2 cifar10 -->\n")
    assert new.endswith("<!-- end -->\nafter\n")
    assert "old" not in new
