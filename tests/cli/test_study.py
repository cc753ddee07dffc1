"""`jemkit reproduce` and `jemkit sweep`: which runs are trained, and what their table says."""

import json
import math
import statistics
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import SHORT, jemkit
from hypothesis import given
from hypothesis import strategies as st
from report_runs import card, record
from study_tools import Calls, Fork, commands_by, done, planned, study

from jemkit.config.registry import installed
from jemkit.errors import ConfigError, DataError, Diverged, Preempted, UnknownName
from jemkit.metrics.figures import plain
from jemkit.metrics.record_file import Record
from jemkit.runtime.files import write_json
from jemkit_cli.paper.tabular import escaped
from jemkit_cli.study.plan import (
    find_study,
    grid,
    part_of,
    read_study,
    study_resolver,
    sweep_resolver,
    sweep_study,
    units,
)
from jemkit_cli.study.running import Failed, state_of
from jemkit_cli.study.table import Cell, _interval, table_of
from jemkit_cli.study.writing import comma_separated, latex, markdown

NAMES = st.lists(st.sampled_from(["a", "b", "c.d", "e.f.g"]), unique=True, min_size=1)
PLAIN = st.lists(st.sampled_from(["0.1", "2", "x", "[1, 2]", '"p,q"']), unique=True, min_size=1)


@given(NAMES, st.data())
def test_a_grid_has_every_combination_once(names: list[str], data: st.DataObject) -> None:
    values = [data.draw(PLAIN) for _ in names]
    choices = grid([f"{name}={','.join(each)}" for name, each in zip(names, values, strict=True)])
    assert len(choices) == math.prod(map(len, values))
    assert len({tuple(choice.items()) for choice in choices}) == len(choices)
    for name, each in zip(names, values, strict=True):
        assert [choice[name] for choice in choices if choice == {**choices[0], name: choice[name]}]
        assert {choice[name] for choice in choices} == set(each)


@pytest.mark.parametrize("setting", ["objective.w2", "=1", ""])
def test_a_setting_without_name_or_value_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        grid([setting])


def test_rows_of_a_sweep_are_named_after_what_varies() -> None:
    rows = sweep_study(["run.epochs=1,2", "optimizer.lr=0.1"], (0,), ["pgd"], []).rows
    assert [row.name for row in rows] == ["run.epochs = 1", "run.epochs = 2"]
    assert rows[1].settings == ("run.epochs=2", "optimizer.lr=0.1")
    assert [row.name for row in sweep_study([], (0,), ["pgd"], []).rows] == ["run"]


def test_a_run_is_known_by_what_changes_its_outcome(tmp_path: Path) -> None:
    given = study("a", "b", seeds=(0, 1))
    plan = planned(given, tmp_path)
    assert len({unit.key for unit in plan}) == len(plan) == 4
    assert [(unit.seed, unit.row.name) for unit in plan] == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    elsewhere = planned(given, tmp_path, run={"device": "cpu", "keep": 5})
    assert [unit.key for unit in elsewhere] == [unit.key for unit in plan]
    longer = planned(given, tmp_path, run={"epochs": 7})
    assert not {unit.key for unit in longer} & {unit.key for unit in plan}


@pytest.mark.parametrize(
    "mark", [5, [1], {"trained": 5}, {"trained": None, "evaluated": 5}, {"evaluated": [[["a"]]]}]
)
def test_a_damaged_mark_of_a_run_is_named(mark: Any, tmp_path: Path) -> None:
    (unit,) = planned(study("one"), tmp_path)
    unit.folder.mkdir()
    write_json(unit.folder / "study.json", mark)
    with pytest.raises(DataError, match=r"study\.json is damaged"):
        state_of(unit)


@pytest.mark.parametrize(
    ("saved", "evaluated"), [(None, ()), ([], ()), (["-q"], (("-q",),)), ([["-q"]], (("-q",),))]
)
def test_a_mark_of_at_most_one_evaluation_is_read(
    saved: Any, evaluated: tuple[Any, ...], tmp_path: Path
) -> None:
    (unit,) = planned(study("one"), tmp_path)
    unit.folder.mkdir()
    write_json(unit.folder / "study.json", {"trained": None, "evaluated": saved})
    assert state_of(unit).evaluated == evaluated


@pytest.mark.parametrize("start", [5, {"path": 3}, {"a": 1}, "text", [1]])
def test_a_folder_that_is_no_run_of_jemkit_is_ignored(start: Any, tmp_path: Path) -> None:
    (unit,) = planned(study("one"), tmp_path)
    config = {"recipe": unit.resolved.tables, "init_from": start}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config, default=str))
    (again,) = planned(study("one"), tmp_path)
    assert again.folder == unit.folder


def test_names_are_escaped_for_latex() -> None:
    assert escaped(r"a_b #1 {$x^2$} 5 % +- \y") == (
        r"a\_b \#1 \{\$x\textasciicircum{}2\$\} 5 \% $\pm$ \textbackslash{}y"
    )


@pytest.mark.parametrize(
    "settings",
    [["extra.file=a.npz,b.npz", "extra.fraction=0.5"], ["data.use=folder", "data.dir=a,b"]],
)
def test_rows_that_only_a_path_tells_apart_are_refused(settings: list[str], tmp_path: Path) -> None:
    registry = installed(third_party=False)
    resolver = sweep_resolver(registry, {"named": {}})
    with pytest.raises(ConfigError, match=r"differ only in (extra\.file|data\.dir)"):
        units(sweep_study(settings, (0,), (), ()), registry, tmp_path, resolver)


def test_what_is_complete_is_not_run_again(tmp_path: Path) -> None:
    calls = Calls()
    done(study(seeds=(0, 1)), tmp_path, calls, jobs=2)
    assert sorted(name for name, _ in calls.commands) == ["evaluate"] * 4 + ["train"] * 4
    done(study(seeds=(0, 1)), tmp_path, calls)
    assert len(calls.commands) == 8
    done(study(seeds=(0, 1), evaluate=("--attack", "aa")), tmp_path, calls)
    assert calls.commands[8:] == [("evaluate", unit.folder.name) for unit in planned(
        study(seeds=(0, 1)), tmp_path)]  # fmt: skip


def test_a_run_is_recognised_under_another_name(tmp_path: Path) -> None:
    calls = Calls()
    (unit,) = done(study("a"), tmp_path, calls)
    unit.folder.rename(tmp_path / "mine")
    (again,) = done(study("other"), tmp_path, calls)
    assert again.folder == tmp_path / "mine"
    assert len(calls.commands) == 2


def test_a_run_that_started_from_another_is_listed_by_both(tmp_path: Path) -> None:
    given = study("second", "first")
    rows = (given.rows[0].model_copy(update={"after": "first"}), given.rows[1])
    given = given.model_copy(update={"rows": rows})
    calls = Calls()
    first, second = done(given, tmp_path, calls)
    config = json.loads((second.folder / "config.json").read_text())
    start = {"given": str(first.folder), "path": str(first.folder)}
    write_json(second.folder / "config.json", {**config, "init_from": start})
    second.folder.rename(tmp_path / "mine")
    assert done(given, tmp_path, calls)[1].folder == tmp_path / "mine"
    assert len(calls.commands) == 4


def test_a_folder_of_another_recipe_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (unit,) = planned(study("a"), tmp_path)
    other = planned(study("a"), tmp_path, run={"epochs": 3})[0].resolved.tables
    unit.folder.mkdir()
    write_json(unit.folder / "config.json", {"recipe": other, "origins": {}})
    with pytest.raises(ConfigError, match="is a run of another recipe than the row 'a'"):
        planned(study("a"), tmp_path)


def test_a_run_that_diverged_is_said_and_not_tried_again(tmp_path: Path) -> None:
    calls, given = Calls(), study()
    calls.faults["a-0"] = Diverged("loss nan")
    plan = done(given, tmp_path, calls)
    done(given, tmp_path, calls)
    assert [name for name, folder in calls.commands if folder.startswith("a-0")] == ["train"]
    assert state_of(plan[0]).diverged
    text = markdown(table_of(given, plan))
    assert "| a | diverged |" in text
    assert "a: 1 of 1 seeds diverged" in text


@pytest.mark.parametrize("fault", [Failed("no data"), Preempted("stopped")])
def test_a_failure_ends_the_study_and_the_next_call_continues(
    tmp_path: Path, fault: Exception
) -> None:
    calls, given = Calls(), study()
    calls.faults["b-0"] = fault
    with pytest.raises(type(fault), match=str(fault)):
        done(given, tmp_path, calls)
    calls.faults.clear()
    before = len(calls.commands)
    done(given, tmp_path, calls)
    assert {folder[0] for _, folder in calls.commands[before:]} == {"b"}


def test_a_row_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    given = study("second", "first")
    rows = (given.rows[0].model_copy(update={"after": "first"}), given.rows[1])
    given = given.model_copy(update={"rows": rows})
    starts = []

    class Watching(Calls):
        def __call__(self, arguments: list[str], stopped: threading.Event, folder: Path) -> str:
            if "--init-from" in arguments:
                starts.append((folder.name, arguments[arguments.index("--init-from") + 1]))
            return super().__call__(arguments, stopped, folder)

    calls = Watching()
    first, second = done(given, tmp_path, calls, jobs=2)
    assert starts == [(second.folder.name, str(first.folder))]
    other = rows[1].model_copy(update={"recipe": {"objective": {"use": "ce"}}})
    changed = given.model_copy(update={"rows": (rows[0], other)})
    assert planned(changed, tmp_path)[1].key != second.key
    assert [row.name for row in part_of(given, (), ["second"]).rows] == ["second", "first"]


def test_rows_that_start_from_each_other_are_refused(tmp_path: Path) -> None:
    given = study("a", "b")
    rows = [row.model_copy(update={"after": "ba"[at]}) for at, row in enumerate(given.rows)]
    with pytest.raises(ConfigError, match="starts from itself: a -> b -> a"):
        planned(given.model_copy(update={"rows": tuple(rows)}), tmp_path)


def judged_by_seed(right: dict[str, int]) -> Callable[[Path], Record]:
    """A record whose PGD-20 outcomes depend on the folder."""

    def judge(folder: Path) -> Record:
        name = folder.name[:3]
        base = record({"clean": 180, "pgd20": right[name]}, seed=int(name[-1]))
        figures = [*base.figures, plain("ece", 0.01 * right[name], 200, card())]
        return Record(base.subject, base.protocol, figures, {}, base.rows)

    return judge


def test_the_figures_of_a_table_are_those_of_its_records(tmp_path: Path) -> None:
    right = {"a-0": 100, "a-1": 120, "b-0": 100, "b-1": 140}
    given = study(seeds=(0, 1), columns=("clean", "pgd20", "ece"), reference="a", compared="pgd20")
    table = table_of(given, done(given, tmp_path, Calls(judged_by_seed(right))))
    a, b = table.lines
    assert a.cells["pgd20"].values == [0.5, 0.6]
    assert a.cells["pgd20"].mean == pytest.approx(0.55)
    assert a.cells["pgd20"].sd == pytest.approx(statistics.stdev([0.5, 0.6]))
    assert a.cells["ece"].mean == pytest.approx(1.1)
    assert a.cells["ece"].low is None
    assert a.difference is None
    assert b.difference is not None
    assert b.difference.values == pytest.approx([0.0, 0.1])
    assert b.difference.low is not None
    assert b.difference.low <= 0.05 <= (b.difference.high or 0)
    assert b.seconds == [12.5, 12.5]
    assert a.checkpoints == ["ab" * 32] * 2
    cell = b.cells["pgd20"]
    assert f"{100 * cell.mean:.1f} % [{100 * (cell.low or 0):.1f}" in markdown(table)
    assert r"60.0 \% [" in latex(table)
    assert len(comma_separated(table).splitlines()) == 1 + 2 * 3 * 2
    assert json.loads(json.dumps(table.to_json()))["rows"][1]["cells"]["pgd20"]["mean"] == 0.6


def test_figures_of_different_protocols_have_no_mean(tmp_path: Path) -> None:
    def judge(folder: Path) -> Record:
        return record(**({"radius_px": 4.0} if folder.name.startswith("a-1") else {}))

    given = study("a", seeds=(0, 1))
    table = table_of(given, done(given, tmp_path, Calls(judge)))
    (line,) = table.lines
    assert "pgd20" not in line.cells
    assert line.why["pgd20"] == "protocols differ"
    assert [cell.values for cell in line.by_seed["pgd20"]] == [[0.6], [0.6]]
    assert " / 60.0 % " in markdown(table)
    assert "clean" not in line.by_seed
    assert "; between rows or seeds these differ: radius_px" in markdown(table)
    assert line.cells["clean"].mean == 0.9


def test_papers_figures_stand_beside_and_never_in_an_empty_cell(tmp_path: Path) -> None:
    given = study("a", columns=("clean", "aa"))
    row = given.rows[0].model_copy(update={"paper": {"aa": 51.69}})
    given = given.model_copy(update={"rows": (row,), "paper": "CIFAR-10."})
    judged = Calls(lambda _: record({"clean": 180}))
    lines = markdown(table_of(given, done(given, tmp_path, judged))).splitlines()
    assert lines[2] == "| method | Clean | AA | seconds | AA, paper |"
    assert lines[4].endswith("|  | 12 | 51.69 |")
    assert any("not measured here. CIFAR-10." in line for line in lines)


@given(st.integers(1, 4), st.integers(2, 40), st.integers(0, 99))
def test_an_interval_lies_within_the_range_of_its_rows(seeds: int, images: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, (seeds, images), generator=rng).double()
    low, high = _interval(rows)
    assert 0 <= low <= high <= 1
    assert _interval(torch.full((seeds, images), 0.25).double()) == pytest.approx((0.25, 0.25))


def test_an_interval_is_that_of_a_mean_over_images() -> None:
    rows = (torch.arange(400)[None] < 100).double()
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert _interval(rows) == pytest.approx((0.25 - half, 0.25 + half), abs=0.01)


def test_a_cell_without_an_interval_shows_its_deviation() -> None:
    from jemkit_cli.study.writing import _shown

    assert _shown(Cell([0.5, 0.6], 0.55, 0.0707)) == "0.55 +- 0.071"
    assert _shown(Cell([0.5], 0.5, share=True)) == "50.0 %"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[study]\ntitle = "x"\n', "rows"),
        ('[[rows]]\nname = "a"\n', "title"),
        ('[study]\ntitle = "x"\n[[rows]]\nname = "a"\n[[rows]]\nname = "a"\n', "two rows 'a'"),
        ('[study]\ntitle = "x"\nreference = "z"\n[[rows]]\nname = "a"\n', "no row 'z'"),
        ('[study]\ntitle = "x"\nnone = 1\n[[rows]]\nname = "a"\n', "none"),
        ("[[", "cannot be read"),
    ],
)
def test_a_study_that_cannot_be_read_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises((ConfigError, DataError), match=message):
        read_study(path, str(path))


def test_an_unknown_study_or_scale_names_those_that_there_are() -> None:
    with pytest.raises(UnknownName, match=r"no study 'table9'.*There are: .*table2"):
        find_study(installed(), "table9", "digits")
    with pytest.raises(UnknownName, match=r"table2 has no scale 'mars'; it has .*digits"):
        find_study(installed(), "table2", "mars")


@pytest.mark.parametrize("popen", [Fork, pytest.param(subprocess.Popen, marks=pytest.mark.slow)])
def test_a_sweep_from_the_command_line(
    tmp_path: Path, popen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands_by(popen, monkeypatch)
    monkeypatch.chdir(tmp_path)
    options = [*SHORT[:-1], "--backbone=classifier", "--objective=ce", "--set=optimizer.lr=0.1,0.2"]
    options = [o for o in options if "buffer" not in o and "backbone.steps" not in o]
    given = ["sweep", *options, "--out", str(tmp_path), "--json"]
    dry = jemkit(*given, "--dry-run")
    assert dry.code == 0, dry.err
    assert [line["row"] for line in dry.record] == [
        "optimizer.lr = 0.1", "optimizer.lr = 0.2", "total"
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())
    outcome = jemkit(*given, "--jobs", "2")
    assert outcome.code == 0, outcome.err
    assert [row["name"] for row in outcome.record["rows"]] == [
        line["row"] for line in dry.record[:-1]
    ]
    for row in outcome.record["rows"]:
        assert set(row["cells"]) == {"clean", "pgd20", "gap_relative"}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/study.json")}
    again = jemkit(*given)
    assert again.record == outcome.record
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert {path.name for path in tmp_path.glob("sweep.*")} == {
        "sweep.md", "sweep.tex", "sweep.csv", "sweep.json"
    }  # fmt: skip


@pytest.mark.parametrize("seeds", ["a", "0,,1", "1,1"])
def test_seeds_that_are_no_list_are_refused(seeds: str) -> None:
    outcome = jemkit("reproduce", "table2", "--seeds", seeds)
    assert outcome.code == 2
    assert "--seeds" in outcome.err


def test_rivals_on_cifar10_are_trained_as_their_published_models() -> None:
    table = find_study(installed(), "table2", "cifar10")
    resolver = study_resolver(table, installed(), {})
    tables = {row.name: resolver(row, 0).tables for row in table.rows if not row.missing}
    assert tables["LBGAT"]["objective"]["beta"] == 0
    assert tables["TDAT"]["backbone"]["network"]["use"] == "resnet"
    assert tables["TDAT"]["backbone"]["network"]["depth"] == 18
