"""Scales, several evaluations and shared statistics of `jemkit reproduce`."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import jemkit, one_line
from sorted_images import sorted_folder
from study_tools import OPTIONS, Calls, Fork, commands_by, done, planned, study
from toys import root

from jemkit.config.registry import installed
from jemkit.errors import ConfigError, DataError
from jemkit.runtime.files import write_json
from jemkit_cli.study import forecast as forecasts
from jemkit_cli.study.evaluations import check_evaluations
from jemkit_cli.study.plan import (
    Study,
    check_data,
    find_study,
    part_of,
    slow_units,
    study_resolver,
    with_settings,
)
from jemkit_cli.study.running import MARK, state_of
from jemkit_cli.study.statistics import study_statistics
from jemkit_cli.study.table import table_of
from jemkit_cli.study.writing import markdown

TWO = (OPTIONS, ("--attack", "aa", "--max-images", "1000"))


def test_each_evaluation_is_run_once_and_those_of_other_studies_stay(tmp_path: Path) -> None:
    calls = Calls()
    (unit,) = done(study("a", evaluate=TWO), tmp_path, calls)
    assert [name for name, _ in calls.commands] == ["train", "evaluate", "evaluate"]
    done(study("a", evaluate=OPTIONS), tmp_path, calls)
    done(study("a", evaluate=TWO), tmp_path, calls)
    assert len(calls.commands) == 3
    assert state_of(unit).evaluated == TWO


def test_a_row_can_have_its_last_weights_evaluated(tmp_path: Path) -> None:
    given, calls = study("a", "b", evaluate=TWO), Arguments()
    last = given.rows[0].model_copy(update={"checkpoint": "last"})
    given = given.model_copy(update={"rows": (last, *given.rows[1:])})
    plan = done(given, tmp_path, calls)
    done(given, tmp_path, calls)
    evaluated = [(Path(a[1]).name[0], "last" in a) for a in calls.arguments if a[0] == "evaluate"]
    assert sorted(evaluated) == [("a", True), ("a", True), ("b", False), ("b", False)]
    assert all(state_of(unit).complete(given.evaluations(unit.row)) for unit in plan)


def test_figures_of_another_checkpoint_are_measured_again(tmp_path: Path) -> None:
    best, calls = study("a", evaluate=TWO), Arguments()
    row = best.rows[0].model_copy(update={"checkpoint": "last"})
    last = best.model_copy(update={"rows": (row,)})
    for given in (best, last, last, best):
        done(given, tmp_path, calls)
    last_weights = ["last" in a for a in calls.arguments if a[0] == "evaluate"]
    assert last_weights == [False, False, True, True, False, False]


def test_one_recipe_with_two_checkpoints_is_refused(tmp_path: Path) -> None:
    given = study("a")
    row = given.rows[0].model_copy(update={"name": "b", "checkpoint": "last"})
    both = given.model_copy(update={"rows": (*given.rows, row)})
    with pytest.raises(ConfigError, match="one recipe with two checkpoints"):
        planned(both, tmp_path)


@pytest.mark.parametrize("scale", ["digits", "cifar10-small", "cifar10"])
def test_models_without_adversarial_training_are_not_chosen_by_their_robustness(scale: str) -> None:
    tables = [key for key in installed().recipes if re.fullmatch(f"study/.*/{scale}", key)]
    for key in tables:
        table = find_study(installed(), key.split("/")[1], scale)
        for row in table.rows:
            plain = row.recipe.get("objective", {}).get("use") in ("ce", "jem")
            if not row.missing:
                run = study_resolver(table, installed(), {})(row, 0).recipe.run
                by_accuracy = plain and scale != "digits"  # whose records have one rule
                assert (run.select == "accuracy") == by_accuracy, (key, row.name)


def test_a_stop_between_two_evaluations_repeats_none(tmp_path: Path) -> None:
    class Stopping(Calls):
        def __call__(self, arguments: list[str], *rest: Any) -> str:
            if "aa" in arguments and not self.faults:
                self.faults["a-0"] = DataError("stopped")
            return super().__call__(arguments, *rest)

    calls = Stopping()
    with pytest.raises(DataError):
        done(study("a", evaluate=TWO), tmp_path, calls)
    again = Calls()
    done(study("a", evaluate=TWO), tmp_path, again)
    assert [name for name, _ in again.commands] == ["evaluate"]


def test_the_mark_of_a_single_evaluation_is_read(tmp_path: Path) -> None:
    (unit,) = planned(study("a"), tmp_path)
    unit.folder.mkdir()
    write_json(unit.folder / MARK, {"trained": {"seconds": 1.0}, "evaluated": list(OPTIONS)})
    assert state_of(unit).evaluated == (OPTIONS,)
    assert state_of(unit).complete((OPTIONS,))
    write_json(unit.folder / MARK, {"trained": {"seconds": 1.0}, "evaluated": None})
    assert state_of(unit).missing((OPTIONS,)) == [OPTIONS]


class Arguments(Calls):
    """Commands with all of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[list[str]] = []

    def __call__(self, arguments: list[str], *rest: Any) -> str:
        self.arguments.append(arguments)
        if arguments[0] == "fid-stats":
            Path(arguments[arguments.index("--out") + 1]).write_bytes(b"statistics")
            return "{}"
        return super().__call__(arguments, *rest)


def test_statistics_are_computed_once_and_before_anything_else(tmp_path: Path) -> None:
    fid = ("--set", "generation.statistics={statistics}")
    given, calls = study("a", "b", evaluate=(OPTIONS, fid)), Arguments()
    done(given, tmp_path, calls)
    assert [each[0] for each in calls.arguments].count("fid-stats") == 1
    assert calls.arguments[0][0] == "fid-stats"
    named = study_statistics(planned(given, tmp_path), given.evaluate, tmp_path)
    assert named is not None
    assert sum(f"generation.statistics={named.file}" in each for each in calls.arguments) == 2
    done(given, tmp_path, calls)
    assert len(calls.arguments) == 1 + 2 * 3
    assert study_statistics(planned(given, tmp_path), (OPTIONS,), tmp_path) is None


def test_statistics_are_those_of_the_reduced_images(tmp_path: Path) -> None:
    rows = [{"name": "a", "recipe": {"objective": {"use": "ce"}}}]
    common = {"data": {"use": "cifar10", "size": 16}, "backbone": {"use": "classifier"}}
    units = planned(study(common=common, rows=rows), tmp_path, data={"dir": str(tmp_path)})
    named = study_statistics(units, (("{statistics}",),), tmp_path)
    assert named is not None
    command = named.command
    assert command[:2] == ["fid-stats", "cifar10"]
    assert command[command.index("--data-dir") + 1] == str(tmp_path)
    assert command[command.index("--set") + 1] == "data.size=16"
    rows.append({"name": "b", "recipe": {"objective": {"use": "ce"}, "data": {"size": 8}}})
    several = planned(study(common=common, rows=rows), tmp_path)
    with pytest.raises(ConfigError, match="the rows have different data sets"):
        study_statistics(several, (("{statistics}",),), tmp_path)


def test_options_of_the_statistics_are_those_of_their_command(tmp_path: Path) -> None:
    whole = ("--set", "generation.statistics={statistics}")
    subset = ("--set", "generation.statistics={statistics --max-images 100}")
    calls = Arguments()
    done(study("a", evaluate=whole), tmp_path, calls)
    done(study("a", evaluate=subset), tmp_path, calls)
    first, second = (each for each in calls.arguments if each[0] == "fid-stats")
    assert "--max-images" not in first
    assert second[2:4] == ["--max-images", "100"]
    files = [each[each.index("--out") + 1] for each in (first, second)]
    assert files[0] != files[1]
    named = [each[-2] for each in calls.arguments if each[0] == "evaluate"]
    assert named == [f"generation.statistics={file}" for file in files]
    both = study("a", "b", evaluate=(whole, subset))
    with pytest.raises(ConfigError, match=r"\{statistics\} and \{statistics --max-images 100\}"):
        done(both, tmp_path, calls)


FILES = [str(path) for path in (root() / "benchmarks").glob("*.toml")]
BUILT_IN = sorted(key for key in installed().recipes if key.startswith("study/"))


@pytest.mark.parametrize("study", [*BUILT_IN, *FILES])
def test_the_evaluations_of_every_study_are_ones_that_evaluate_accepts(study: str) -> None:
    named = study.removeprefix("study/").split("/") if study in BUILT_IN else (study, "")
    check_evaluations(find_study(installed(), *named), installed())


@pytest.mark.parametrize(("options", "message"), [
    (("--bogus",), "No such option: --bogus"),
    (("--max-images", "some"), "valid integer"),
    (("--skip", "robustness", "--indicators", "off"), "options of 'robustness' are set"),
    (("--attack", "pdg"), "did you mean 'pgd'"),
    (("--only", "generation", "--set", "generation.m=3"), "no such option"),
    (("--norm", "L2"), "no default radius"),
    (("other",), "unexpected extra argument"),
    (("--skip", "generation", "--set", "generation.statistics={statistics}"), "does not run"),
    (("--set", "generation.statistcs={statistics}"), "did you mean 'statistics'"),
    (("--set", "generation.statistics={statistics --max-image 3}"), "No such option: --max-image"),
    (("--set", "generation.statistics={statistics --inception 'a}"), "No closing quotation"),
])  # fmt: skip
def test_options_that_evaluate_refuses_end_a_study_before_it_trains(
    options: tuple[str, ...], message: str
) -> None:
    given = study("a", evaluate=options)
    with pytest.raises(ConfigError, match=message) as caught:
        check_evaluations(given, installed())
    assert options[-1].partition("=")[2] in str(caught.value)


def test_a_sweep_names_an_unknown_attack_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = one_line(jemkit("sweep", "--set=run.epochs=1,2", "--attack=pdg"), 3)
    assert "did you mean 'pgd'" in message
    assert not list(tmp_path.iterdir())


def test_a_study_lies_over_the_settings_of_its_scale() -> None:
    recipes = {
        "scale/toy": {"study": {"seeds": [3], "columns": ["clean"]},
                      "common": {"run": {"epochs": 2}, "data": {"use": "digits"}}},
        "study/mine/toy": {"study": {"title": "Mine", "columns": ["pgd20"]},
                           "common": {"run": {"batch_size": 8}}, "rows": [{"name": "a"}]},
    }  # fmt: skip
    given = find_study(replace(installed(), recipes=recipes), "mine", "toy")
    assert (given.seeds, given.columns) == ((3,), ("pgd20",))
    assert given.common == {"run": {"epochs": 2, "batch_size": 8}, "data": {"use": "digits"}}


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_scale_without_its_data_says_how_to_get_them(tmp_path: Path, more: list[str]) -> None:
    given = ["reproduce", "table2", "--scale", "cifar10-small", "--out", str(tmp_path / "out")]
    outcome = jemkit(*given, "--data-dir", str(tmp_path), *more)
    assert outcome.code == 6
    assert "data_batch_1 is missing; give --data-dir DIR where it is, or --download" in outcome.err
    assert not (tmp_path / "out").exists()


def test_data_are_read_before_anything_runs(tmp_path: Path) -> None:
    common = {"data": {"use": "cifar10"}, "backbone": {"use": "classifier"}}
    given = study("a", common=common)
    with pytest.raises(DataError, match="is missing"):
        check_data(planned(given, tmp_path, data={"dir": str(tmp_path)}))


def test_a_forecast_names_the_rows_that_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def timed(recipe: Any, batch_size: int, _: int) -> tuple[float, int]:
        sizes.append(batch_size)
        if recipe.objective.attack.steps == 2:
            raise DataError("no weights")
        return (100.0 if len(sizes) > 2 else 0.5), 320

    monkeypatch.setattr(forecasts, "_step_seconds", timed)
    given = study("a", "b", "c", common={
        "data": {"use": "digits"}, "backbone": {"use": "classifier"},
        "run": {"batch_size": 32, "epochs": 3},
    })  # fmt: skip
    lines = forecasts.forecast(given, planned(given, tmp_path), 1)
    assert [line["training, s"] for line in lines] == [15, None, 100 * 4 * 10 * 3, None]
    assert lines[1]["problem"] == "no weights"
    assert lines[-1]["problem"] == "1 rows cannot run"
    assert sizes == [8, 32, 8, 8]  # a slow step is timed with few images alone


def test_settings_of_a_study_apply_to_every_row_and_are_in_its_table(tmp_path: Path) -> None:
    given = study("a", "b")
    own = given.rows[0].model_copy(update={"settings": ("run.epochs=7",)})
    given = given.model_copy(update={"rows": (own, given.rows[1])})
    changed = with_settings(given, ["run.epochs=2", "optimizer.lr=0.3"])
    plan = planned(changed, tmp_path)
    assert [unit.resolved.recipe.run.epochs for unit in plan] == [2, 2]
    assert not {unit.key for unit in plan} & {unit.key for unit in planned(given, tmp_path)}
    table = table_of(changed, done(changed, tmp_path, Calls()))
    assert table.to_json()["settings"] == ["run.epochs=2", "optimizer.lr=0.3"]
    assert "- Every row with run.epochs=2, optimizer.lr=0.3." in markdown(table).splitlines()


def test_settings_on_the_command_line_reach_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        forecasts, "_training_seconds", lambda unit: unit.resolved.recipe.run.epochs
    )
    given = ("reproduce", "table2", "--row=MART", "--seeds=0", "--dry-run", "--json")
    monkeypatch.chdir(tmp_path)
    outcome = jemkit(*given, "--set", "run.epochs=3")
    assert [line["training, s"] for line in outcome.record] == [3, 3]
    refused = jemkit(*given, "--set", "run.epoch=3")
    assert refused.code == 3
    assert "run.epoch" in refused.err


@pytest.mark.parametrize(
    "given",
    [
        study("a", settings=["run.seed=3"]),
        study("a", common={"run": {"seed": 3}, "data": {"use": "digits"}}),
        study(rows=[{"name": "a", "settings": ["run.seed = 3"]}]),
    ],
)
def test_a_seed_among_the_settings_of_a_study_is_refused(given: Study, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"row 'a': run\.seed is set.*--seeds 0,1,2"):
        planned(given, tmp_path)


def test_seeds_of_a_sweep_are_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = jemkit("sweep", "--backbone=classifier", "--objective=ce", "--set=run.seed=1,2")
    assert outcome.code == 3
    assert "--seeds 0,1,2" in outcome.err


@pytest.mark.parametrize("native", [True, False])
def test_a_study_in_a_precision_that_is_emulated_says_so_once(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    for precision, expected in (("bf16", [] if native else ["run.precision"]), ("fp32", [])):
        common = {"run": {"precision": precision, "device": "cpu"}, "data": {"use": "digits"}}
        texts = slow_units(planned(study("a", "b", common=common), tmp_path))
        assert [text.partition(":")[0] for text in texts] == expected


TOY = """
[study]
title = "Reduced images"
columns = ["clean", "pgd20", "overlap/clean-adv"]
figure = "energies"
evaluate = [
    ["--attack", "pgd", "--only", "robustness", "--indicators", "off"],
    ["--attack", "pgd", "--only", "energies", "--set", "energies.n=2", "--max-images", "2"],
]

[common.run]
epochs = 1
batch_size = 4
valid_fraction = 0.5

[common.data]
use = "folder"
size = 8

[common.backbone]
use = "classifier"
network = { use = "smallcnn" }

[[rows]]
name = "standard training"
recipe.objective.use = "ce"
"""


def test_a_toy_study_of_resized_images_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands_by(Fork, monkeypatch)
    monkeypatch.chdir(tmp_path)
    images = sorted_folder(tmp_path / "images", n=4, shape=(12, 12, 3))
    (tmp_path / "toy.toml").write_text(TOY)
    out = tmp_path / "out"
    given = ["reproduce", str(tmp_path / "toy.toml"), "--data-dir", str(images), "--json"]
    outcome = jemkit(*given, "--out", str(out))
    assert outcome.code == 0, outcome.err
    assert set(outcome.record["rows"][0]["cells"]) == {"clean", "pgd20", "overlap/clean-adv"}
    assert outcome.record["protocols"]["pgd20"]["image_px"] == 8
    assert {path.name for path in out.glob("toy.*")} == {
        f"toy.{suffix}" for suffix in ("md", "tex", "csv", "json", "svg")
    }
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")}
    again = jemkit(*given, "--out", str(out))
    assert again.record == outcome.record
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table4", "table5",
                                  "figure1", "figure2", "figure3"])  # fmt: skip
@pytest.mark.parametrize("scale", ["digits", "cifar10-small", "cifar10"])
def test_every_table_and_figure_has_every_scale(tmp_path: Path, name: str, scale: str) -> None:
    given = find_study(installed(), name, scale)
    plan = planned(given, tmp_path, data={"dir": str(tmp_path)} if scale != "digits" else {})
    assert len(plan) == sum(not row.missing for row in given.rows) * len(given.seeds)
    assert given.paper
    assert all(math.isfinite(value) for row in given.rows for value in row.paper.values())
    assert len({json.dumps(unit.resolved.tables["data"], default=str) for unit in plan}) == 1
    assert part_of(given, (0,), ()).seeds == (0,)
