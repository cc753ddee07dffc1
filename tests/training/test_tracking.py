"""Trackers receive a run's figures, and change nothing of the run."""

import csv
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Toy, toy_recipe, toy_registry
from trackers import CALLS, GUEST, stand_in

from jemkit import ConfigError, Diverged, Figure, Preempted, Registry, train
from jemkit.config.recipe import Resolved, resolve
from jemkit.config.retired import current
from jemkit.runtime import distributed
from jemkit.runtime.files import load_tensors
from jemkit.runtime.run_dir import RunFolder
from jemkit.runtime.work_cache import Shard
from jemkit.training.metrics_log import GATHER
from jemkit.training.plan import plan
from jemkit.training.resuming import resolve_for_resume
from jemkit.training.tracking import Tracking

REGISTRY = toy_registry([GUEST])
CE = ("classifier", "ce", "plain")
SMALL = ("run.eval_images=2", "run.test_images=3", "run.max_train=30")


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


def recipe(*overrides: str) -> Resolved:
    return toy_recipe(REGISTRY, *CE, *SMALL, *overrides)


def tracked(out: Path, *overrides: str, **given: Any) -> Path:
    train(recipe(*overrides), out, registry=REGISTRY, **given)
    return out


def after(steps: int) -> Callable[[], bool]:
    """A signal to stop that comes after so many steps."""
    asks = iter(range(1000))
    return lambda: next(asks) >= steps


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def rows(out: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv."""
    with (out / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def scalars(out: Path) -> dict[str, dict[int, float]]:
    """What `Writer` has in place of TensorBoard's files: figures, by step."""
    shown: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (out / "tensorboard" / "scalars.jsonl").read_text().splitlines()):
        if isinstance(line, dict):
            for points in shown.values():
                for step in [
                    step for step in points if line["purge"] is not None and step >= line["purge"]
                ]:
                    del points[step]
        else:
            shown.setdefault(line[0], {})[line[2]] = line[1]
    return shown


def events_files(out: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(out / "tensorboard"), {"scalars": 0})
    board.Reload()
    return {
        tag: {point.step: point.value for point in board.Scalars(tag)}
        for tag in board.Tags()["scalars"]
    }


@pytest.mark.parametrize("read", [scalars, events_files])
def test_csv_jsonl_and_tensorboard_have_the_same_figures_also_after_a_resumption(
    read: Callable[[Path], dict[str, dict[int, float]]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if read is scalars:
        stand_in(monkeypatch)
    else:
        pytest.importorskip("tensorboard")
    on = "trackers.tensorboard={}"
    with pytest.raises(Preempted):
        tracked(tmp_path / "run", on, stop=after(4))
    # as if it had been killed after its checkpoint: these figures are written again
    out = tracked(tmp_path / "run", on, resume=True)
    wanted: dict[str, dict[int, float]] = {}
    for row in rows(out):
        step = int(row.pop("step"))
        for name, value in row.items():
            wanted.setdefault(name.replace(" ", "/"), {})[step] = value
    for entry in events(out, "epoch"):
        for name in ("accuracy", "pgd10", "seconds"):
            wanted.setdefault(f"valid/{name}", {})[entry["step"] - 1] = entry[name]
    (end,) = events(out, "end")
    for figure in end["figures"]:
        wanted[f"test/{figure['name']}"] = {6: figure["value"]}
    assert {"loss", "lr", "epoch", "images/s", "valid/pgd10", "test/clean"} <= set(wanted)
    assert [*wanted["loss"]] == [*range(6)]
    shown = read(out)
    assert set(shown) == set(wanted)
    for name, points in wanted.items():
        assert shown[name] == pytest.approx(points, rel=1e-6), name


def test_callbacks_come_in_the_order_of_the_run(tmp_path: Path) -> None:
    out = tracked(tmp_path / "run", "trackers.hear={}")
    names = [name for name, *_ in CALLS]
    assert GATHER > 3
    wanted = ["begin", *["step"] * 3, "epoch", *["step"] * 3, "epoch", "evaluation", "end"]
    assert names == wanted
    (begun,) = CALLS[0][1:]
    assert (begun.folder, begun.step, begun.total_steps) == (out, 0, 6)
    assert begun.recipe == json.loads((out / "config.json").read_text())["recipe"]
    assert [step for name, step, *_ in CALLS if name == "step"] == [*range(6)]
    assert CALLS[-1] == ("end", "finished")


def test_a_tracker_changes_nothing_of_what_another_gets(tmp_path: Path) -> None:
    given: dict[str, Any] = {"run": {"epochs": 2}}
    specs = recipe("trackers.meddle={}", "trackers.hear={}").recipe.trackers
    assert [*specs] == ["meddle", "hear"]
    with Tracking(specs, RunFolder(tmp_path)) as tracking:
        tracking.begin(given, 0, 12)
        tracking.rows([{"step": 0, "loss": 1.0}])
        tracking.epoch({"epoch": 1, "step": 2, "pgd10": 0.5})
        tracking.evaluation(3, [Figure("clean", 0.5, None, None, 6, {})])
    assert given == CALLS[0][1].recipe == {"run": {"epochs": 2}}
    assert CALLS[1:] == [
        ("step", 0, {"loss": 1.0}), ("epoch", 2, {"pgd10": 0.5}),
        ("evaluation", 3, [Figure("clean", 0.5, None, None, 6, {})]), ("end", "finished"),
    ]  # fmt: skip


def weights(out: Path) -> dict[str, torch.Tensor]:
    (path,) = (out / "checkpoints").glob("step-00000006")
    return {
        f"{name}: {key}": tensor
        for name in ("model", "state")
        for key, tensor in load_tensors(path / f"{name}.safetensors").items()
    }


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.flatten().view(torch.uint8)


def test_a_tracker_changes_nothing_of_a_run(tmp_path: Path) -> None:
    plain = tracked(tmp_path / "plain")
    on = ("trackers.meddle={}", "trackers.hear.raises=epoch")
    with_trackers = tracked(tmp_path / "tracked", *on)
    one, other = weights(plain), weights(with_trackers)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(bits(one[key]), bits(other[key]))] == []
    figures = [
        [f["value"] for f in events(out, "end")[0]["figures"]] for out in (plain, with_trackers)
    ]
    assert figures[0] == figures[1]
    assert [row["loss"] for row in rows(plain)] == [row["loss"] for row in rows(with_trackers)]
    assert json.loads((with_trackers / "config.json").read_text())["recipe"]["run"]["epochs"] == 2


@pytest.mark.parametrize(
    "callback", ["begin", "step", "epoch", "evaluation", "rollback", "end", "step!"]
)
def test_a_tracker_that_raises_is_named_once_and_switched_off(
    callback: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    on = recipe(f"trackers.hear.raises={callback}", "trackers.other={use='hear'}")
    out, row = tmp_path, {"step": 0, "loss": 1.0}
    with caplog.at_level(logging.WARNING), Tracking(on.recipe.trackers, RunFolder(out)) as tracking:
        tracking.begin({}, 0, 12)
        tracking.rows([row, row])
        tracking.epoch({"epoch": 1, "step": 2, "pgd10": 0.5})
        tracking.rollback({"at": 1}, 1)
        tracking.evaluation(3, [Figure("clean", 0.5, None, None, 6, {})])
    named = [r.getMessage() for r in caplog.records if "tracker" in r.getMessage()]
    what = "SystemExit: 3" if callback.endswith("!") else "ConnectionError: the server is away"
    (message,) = named
    assert message.startswith(f"the tracker hear raised {what}. It is switched off")
    (event,) = events(out, "tracker")
    assert (event["name"], event["message"]) == ("hear", message)
    called = [name for name, *_ in CALLS]
    assert called.count(callback.removesuffix("!")) == (3 if "step" in callback else 2)
    assert called.count("end") == (2 if callback == "end" else 1)


def test_a_missing_package_is_an_error_before_the_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "load", lambda *_: pytest.fail("the data are read"))
    for name in ("tensorboard", "wandb", "mlflow"):
        missing = "torch.utils.tensorboard" if name == "tensorboard" else name
        monkeypatch.setitem(sys.modules, missing, None)
        wanted = rf"the tracker {name} needs the package {name}: pip install .*\[{name}\]"
        with pytest.raises(ConfigError, match=wanted):
            tracked(tmp_path / "run", f"trackers.{name}={{}}")
        with pytest.raises(ConfigError, match=wanted):
            plan(recipe(f"trackers.{name}={{}}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_ends_as_preempted_and_goes_on_with_what_was_stored(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        tracked(tmp_path / "run", "trackers.hear={}", stop=after(4))
    assert CALLS[-1] == ("end", "preempted")
    CALLS.clear()
    resolved = resolve_for_resume(REGISTRY, tmp_path / "run")
    train(resolved, tmp_path / "run", registry=REGISTRY, resume=True)
    (begun,) = CALLS[0][1:]
    assert (begun.step, begun.stored) == (4, {"begun": 1})
    assert json.loads((tmp_path / "run" / "trackers" / "hear.json").read_text()) == {"begun": 2}
    steps = [step for name, step, *_ in CALLS if name == "step"]
    assert steps == [4, 5]


def test_a_resumed_run_takes_and_drops_trackers(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def stopped(*overrides: str) -> dict[str, Any]:
        resolved = resolve_for_resume(REGISTRY, out, overrides=overrides)
        with pytest.raises(Preempted):
            train(resolved, out, registry=REGISTRY, resume=True, stop=after(0))
        saved: dict[str, Any] = json.loads((out / "config.json").read_text())
        return saved["recipe"]["trackers"]  # type: ignore[no-any-return]

    with pytest.raises(Preempted):
        tracked(out, stop=after(3))
    assert stopped("trackers.hear={}") == {"hear": {"use": "hear", "raises": ""}}
    assert stopped("trackers.hear.raises=end")["hear"]["raises"] == "end"
    assert stopped("trackers.hear=false") == {}
    assert [name for name, *_ in CALLS] == ["begin", "end", "begin", "end"]


def test_a_damaged_file_of_what_was_stored_is_named_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Preempted):
        tracked(tmp_path / "run", "trackers.hear={}", stop=after(3))
    (tmp_path / "run" / "trackers" / "hear.json").write_text("{")
    tracked(tmp_path / "run", "trackers.hear={}", resume=True)
    assert "the tracker ignores it" in caplog.text
    assert [run.stored for name, run, *_ in CALLS if name == "begin"] == [{}, {}]


def test_a_run_that_diverges_is_rolled_back_and_ends_as_failed(tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        tracked(tmp_path / "run", "trackers.hear={}", "optimizer.lr=1e30", "sentinel.tries=1")
    names = [name for name, *_ in CALLS]
    assert ("rollback", 0) in CALLS
    assert names.count("rollback") == len(events(tmp_path / "run", "rollback"))
    assert CALLS[-1] == ("end", "failed")


def test_only_the_first_process_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "shard", lambda: Shard(1, 2))
    tracking = Tracking(recipe("trackers.hear={}").recipe.trackers, RunFolder(tmp_path))
    with tracking:
        tracking.begin({}, 0, 12)
        tracking.rows([{"step": 0, "loss": 1.0}])
    assert CALLS == []


def names_of(resolved: Resolved) -> list[str]:
    return [*resolved.recipe.trackers]


class TestRunTensorboard:
    """`run.tensorboard`, the option before there were trackers."""

    def test_it_selects_the_tracker_with_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        assert names_of(recipe("run.tensorboard=true")) == ["tensorboard"]
        assert "deprecated and will be removed: use --tracker tensorboard" in caplog.text
        on = "trackers.tensorboard={}"
        assert names_of(recipe(on, "run.tensorboard=false")) == []

    def test_a_saved_config_is_translated_silently(self, caplog: pytest.LogCaptureFixture) -> None:
        run = {"epochs": 2, "tensorboard": True}
        assert current({"run": run}) == {
            "run": {"epochs": 2}, "trackers": {"tensorboard": {"use": "tensorboard"}},
        }  # fmt: skip
        assert current({"run": {**run, "tensorboard": False}}) == {"run": {"epochs": 2}}
        assert caplog.text == ""

    def test_an_old_run_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stand_in(monkeypatch)
        with pytest.raises(Preempted):
            tracked(tmp_path / "run", stop=after(3))
        path = tmp_path / "run" / "config.json"
        config = json.loads(path.read_text())
        del config["recipe"]["trackers"]
        config["recipe"]["run"]["tensorboard"] = True
        path.write_text(json.dumps(config))
        resolved = resolve_for_resume(REGISTRY, tmp_path / "run")
        train(resolved, tmp_path / "run", registry=REGISTRY, resume=True)
        assert (tmp_path / "run" / "tensorboard" / "scalars.jsonl").is_file()


def test_a_saved_config_brings_no_trackers_to_another_run(tmp_path: Path) -> None:
    out = tracked(tmp_path / "run", "trackers.hear={}")
    assert names_of(resolve(REGISTRY, config=out / "config.json")) == []
    assert names_of(resolve(REGISTRY, base=out / "config.json")) == ["hear"]
    evaluated = Registry(REGISTRY.shelves | {"tracker": {}}, REGISTRY.recipes)  # type: ignore[operator]
    assert resolve(evaluated, config=out / "config.json").recipe.run.epochs == 2


def test_a_recipe_names_trackers_by_tables() -> None:
    both = {"trackers": {"hear": {"raises": "end"}, "second": {"use": "hear"}}}
    assert names_of(resolve(REGISTRY, config=both)) == ["hear", "second"]
    for tables, wanted in (
        ({"ear": {}}, r"no tracker 'ear' \(did you mean 'hear'\?\)"),
        ({"hear": {"raise": ""}}, r"trackers.hear.raise: no such option \(did you mean 'raises'"),
        ({"../x": {"use": "hear"}}, "should match pattern"),
        ({"hear": True}, "trackers.hear: expected a tracker, got bool"),
        (["hear"], "trackers"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=wanted):
            resolve(REGISTRY, config={"trackers": tables})
