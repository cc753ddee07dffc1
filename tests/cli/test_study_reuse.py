"""A study finds its runs again: of which weights and images, on what device, and seed by seed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_tools import jemkit
from report_runs import record
from sorted_images import sorted_folder
from study_tools import Calls, done, planned, study

from jemkit.errors import ConfigError
from jemkit.metrics import record as records
from jemkit.metrics.evaluator import Notes
from jemkit.metrics.record_file import Record
from jemkit.runtime.files import file_hash, read_json, write_json
from jemkit_cli.study.images import check_images
from jemkit_cli.study.running import run_all, state_of
from jemkit_cli.study.table import table_of


def of_weights(sha: str, right: int) -> Record:
    """The record of a model with this hash, which classifies so many images correctly."""
    result = record({"clean": right})
    protocol = {**result.protocol, "checkpoint": sha}
    return replace(result, subject={**result.subject, "sha256": sha}, protocol=protocol)


class Printing(Calls):
    """Commands that print what jemkit's would, with all of their arguments."""

    def __init__(self, right: int = 100) -> None:
        super().__init__(lambda folder: of_weights("a1" * 32, right))
        self.arguments: list[list[str]] = []

    def __call__(self, arguments: list[str], *rest: Any) -> str:
        self.arguments.append(arguments)
        output = super().__call__(arguments, *rest)
        return '{"subject": {"sha256": "' + "a1" * 32 + '"}}' if output == "{}" else output


def test_the_table_has_the_weights_that_the_study_evaluated(tmp_path: Path) -> None:
    given = study("a", columns=("clean",))
    plan = done(given, tmp_path, Printing())
    assert state_of(plan[0]).weights == "a1" * 32
    before = table_of(given, plan).lines[0]
    records.save(plan[0].folder, of_weights("b2" * 32, 17), Notes())  # evaluated by hand
    after = table_of(given, plan).lines[0]
    assert after.cells["clean"].mean == before.cells["clean"].mean
    assert after.checkpoints == before.checkpoints == ["a1" * 32]


def test_a_difference_is_of_the_seeds_that_both_rows_have(tmp_path: Path) -> None:
    given = study("a", "b", seeds=(0, 1, 2), columns=("pgd20",), reference="a")
    plan = planned(given, tmp_path)
    right = {("a", 0): 50, ("a", 1): 60, ("b", 1): 90, ("b", 2): 70}
    for unit in plan:
        number = right.get((unit.row.name, unit.seed))
        unit.folder.mkdir()
        if number is None:
            state = {"trained": {"diverged": "at step 3"}, "evaluated": []}
        else:
            records.save(unit.folder, record({"pgd20": number}), Notes())
            evaluated = [list(options) for options in given.evaluations(unit.row)]
            state = {"trained": {"seconds": 1.0}, "evaluated": evaluated}
        write_json(unit.folder / "study.json", state)
    difference = table_of(given, plan).lines[1].difference
    assert difference is not None
    images = len(next(iter(record().rows.values())))
    assert difference.values == [pytest.approx(30 / images)]  # of seed 1 alone


def test_commands_get_the_device_and_the_folder_that_the_images_are_in_now(tmp_path: Path) -> None:
    given = study("a", common={
        "backbone": {"use": "classifier"}, "data": {"use": "cifar10"}, "run": {"device": "cpu"},
    })  # fmt: skip
    for folder in ("here", "there"):
        calls = Printing()
        plan = planned(given, tmp_path / "out", data={"dir": folder})
        if folder == "there":
            mark = plan[0].folder / "study.json"
            write_json(mark, {**read_json(mark), "evaluated": []})
        run_all(
            plan, given, tmp_path / "out", jobs=1, report=lambda _: None, progress=None,
            stop=lambda: False, call=calls, options=["--no-plugins"],
        )  # fmt: skip
        evaluate = calls.arguments[-1]
        assert evaluate[evaluate.index("--device") + 1] == "cpu"
        assert all("--no-plugins" in arguments for arguments in calls.arguments)
        assert ("--data-dir" in evaluate) == (folder == "there")


def test_a_run_on_other_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for at, name in enumerate(("cats", "dogs")):
        sorted_folder(tmp_path / name, n=10, seed=1000 * at)
    options = ["sweep", "--backbone=classifier", "--objective=ce", "--dataset=folder",
               "--set=data.size=8", "--set=run.epochs=1", "--set=run.batch_size=4",
               "--out", str(tmp_path / "out")]  # fmt: skip
    first = jemkit(*options, "--data-dir", str(tmp_path / "cats"), "--json")
    assert first.code == 0, first.err
    (tmp_path / "cats").rename(tmp_path / "moved")
    moved = jemkit(*options, "--data-dir", str(tmp_path / "moved"), "--json")
    assert json.loads(moved.out) == json.loads(first.out)
    other = jemkit(*options, "--data-dir", str(tmp_path / "dogs"))
    assert other.code == 3
    assert "on other images: the training images of" in other.err.splitlines()[-1]


def test_another_file_of_generated_images_is_another_study(tmp_path: Path) -> None:
    given = study("a")
    (unit,) = planned(given, tmp_path / "out", extra={})
    for name in "ab":
        (tmp_path / f"{name}.npz").write_bytes(name.encode())
    tables = {**unit.resolved.tables, "extra": {"file": "a.npz", "fraction": 0.5}}
    unit.folder.mkdir(parents=True)
    write_json(unit.folder / "config.json", {"recipe": tables, "extra_data": {"sha256": "0" * 64}})
    extra = unit.resolved.recipe.extra.model_copy(update={"file": tmp_path / "b.npz"})
    recipe = unit.resolved.recipe.model_copy(update={"extra": extra})
    now = {**tables, "extra": {"file": str(tmp_path / "b.npz"), "fraction": 0.5}}
    changed = unit._replace(resolved=unit.resolved._replace(recipe=recipe, tables=now))
    with pytest.raises(ConfigError, match=r"b\.npz is another file than its extra\.file"):
        check_images([changed])
    check_images([unit])
    write_json(unit.folder / "config.json", {
        "recipe": tables, "extra_data": {"sha256": file_hash(tmp_path / "b.npz")},
    })  # fmt: skip
    check_images([changed])  # the same file elsewhere


def test_a_sweep_has_the_seed_of_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[run]\nseed = 5\n")
    done = jemkit("sweep", "--config", str(tmp_path / "mine.toml"), "--dry-run", "--json",
                  "--out", str(tmp_path / "out"), "--set", "run.epochs=1")  # fmt: skip
    assert done.code == 0, done.err
    assert {row["seed"] for row in json.loads(done.out) if row["seed"] is not None} == {5}


def test_a_study_of_the_users_own_has_no_scale(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("")
    done = jemkit("reproduce", str(tmp_path / "mine.toml"), "--scale", "cifar10")
    assert done.code == 2
    assert "omit --scale" in done.err
