"""The trackers of other packages: what they send, with stand-ins and with the real packages."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toys import REGISTRY, toy_recipe, toy_registry
from trackers import stand_in

from jemkit import Preempted, TrackedRun, train
from jemkit.testing import check_tracker
from jemkit_plugins.mlflow import spelt

RECIPE = ("classifier", "ce", "plain", "run.eval_images=2", "run.test_images=3", "run.max_train=30")


def stopped_and_resumed(out: Path, *overrides: str) -> list[dict[str, str]]:
    """A run of two epochs of three steps, in two parts; its rows of metrics.csv."""
    registry, asks = toy_registry(), iter(range(99))
    recipe = toy_recipe(registry, *RECIPE, *overrides)
    with pytest.raises(Preempted):
        train(recipe, out, registry=registry, stop=lambda: next(asks) >= 4)
    train(recipe, out, registry=registry, resume=True)
    lines = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_built_in_tracker_keeps_the_laws_of_its_kind(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    check_tracker(REGISTRY["tracker"][name]())


def test_wandb_and_mlflow_get_every_figure_and_continue_their_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, mlflow = stand_in(monkeypatch)
    on = ("trackers.wandb={project='jem', mode='offline'}", "trackers.mlflow={}")
    rows = stopped_and_resumed(tmp_path / "run", *on)
    assert [(b["id"], b["project"], b["mode"], b["name"]) for b in wandb.began] == [
        (None, "jem", "offline", "run"), ("new1", "jem", "offline", "run"),
    ]  # fmt: skip
    assert wandb.began[0]["config"]["run"]["epochs"] == 2
    assert [began["resume"] for began in wandb.began] == ["allow"] * 2
    assert wandb.axes == [("step", {}), ("*", {"step_metric": "step"})] * 2
    assert wandb.codes == [5, 0]
    shown = [row for row in wandb.rows if "loss" in row]
    assert [row["step"] for row in shown] == [*range(6)]
    assert [row["loss"] for row in shown] == [float(row["loss"]) for row in rows]
    (only,) = mlflow.store.runs.items()
    assert only == (f"{0:032x}", "FINISHED")
    assert ("run.epochs", "2") in mlflow.store.params
    sent = [(value, step) for name, value, _, step in mlflow.store.metrics if name == "loss"]
    assert sent == [(float(row["loss"]), int(row["step"])) for row in rows]
    names = {name for name, *_ in mlflow.store.metrics}
    assert {"valid/pgd10", "test/clean", "loss_p_y_given_x", "E_x"} <= names
    assert {name for row in wandb.rows for name in row} >= {"valid/pgd10", "test/clean", "E(x)"}


def test_an_id_that_is_none_and_a_run_that_is_gone_begin_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, mlflow = stand_in(monkeypatch)
    for id in ("../../x", 3, "f" * 32):
        for name in ("wandb", "mlflow"):
            tracker = REGISTRY["tracker"][name]().build()
            tracker.on_begin(TrackedRun(tmp_path, {}, 3, 6, {"id": id}, lambda _: None))
    assert [began["id"] for began in wandb.began] == [None, "3", "f" * 32]
    assert len(mlflow.store.runs) == 3


def test_tensorboard_hides_all_points_after_a_rollback_to_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    tracker = REGISTRY["tracker"]["tensorboard"]().build()
    tracker.on_begin(TrackedRun(tmp_path, {}, 0, 6, {}, lambda _: None))
    tracker.on_step(0, {"loss": 9.0})
    tracker.on_rollback(0)
    tracker.on_end("finished")
    lines = (tmp_path / "tensorboard" / "scalars.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][1:] == [["loss", 9.0, 0], {"purge": 0}]


def test_mlflow_gets_figures_after_each_epoch_and_shows_a_resumed_run_as_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mlflow = stand_in(monkeypatch)
    stored: dict[str, Any] = {}
    for _ in range(2):
        tracker = REGISTRY["tracker"]["mlflow"]().build()
        tracker.on_begin(TrackedRun(tmp_path, {}, 0, 6, {**stored}, stored.update))
        assert [*mlflow.store.runs.values()] == ["RUNNING"]
        tracker.on_epoch(3, {"pgd10": 0.5})
        (*_, last) = mlflow.store.metrics
        assert (last[0], last[1], last[3]) == ("valid/pgd10", 0.5, 3)
        tracker.on_end("preempted")
        assert [*mlflow.store.runs.values()] == ["KILLED"]
        mlflow.store.metrics.clear()


def test_every_setting_reaches_mlflow_a_hundred_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mlflow = stand_in(monkeypatch)
    recipe = {"run": {f"setting{i}": i for i in range(250)}}
    tracker = REGISTRY["tracker"]["mlflow"]().build()
    tracker.on_begin(TrackedRun(tmp_path, recipe, 0, 6, {}, lambda _: None))
    assert mlflow.store.params == [(f"run.setting{i}", str(i)) for i in range(250)]


def test_names_of_figures_are_spelt_in_mlflows_alphabet() -> None:
    names = ["E(x+)", "E(x-)", "E(x~)", "E(x)", "loss p(y|x)", "gap x+ x-", "gap x~ x", "images/s"]
    assert [spelt(name) for name in names] == [
        "E_xpos", "E_x-", "E_xadv", "E_x", "loss_p_y_given_x", "gap_xpos_x-", "gap_xadv_x",
        "images/s",
    ]  # fmt: skip
    assert spelt("größe*") == "gr__e_"


def records(path: Path) -> Iterator[Any]:
    """The records of a file of W&B, in the format of LevelDB's logs."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_the_real_wandb_gets_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    check_tracker(REGISTRY["tracker"]["wandb"](mode="offline"))
    rows = stopped_and_resumed(tmp_path / "run", "trackers.wandb={mode='offline'}")
    known = json.loads((tmp_path / "run" / "trackers" / "wandb.json").read_text())["id"]
    parts = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{known}/*.wandb"))
    assert len(parts) == 2
    shown: dict[str, dict[int, float]] = {}
    for record in (record for part in parts for record in records(part)):
        if record.WhichOneof("record_type") != "history":
            continue
        items = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
        for name in items.keys() - {"step"}:
            shown.setdefault(name, {})[items["step"]] = items[name]
    assert shown["loss"] == {int(row["step"]): float(row["loss"]) for row in rows}
    assert {"valid/pgd10", "test/clean", "loss p(y|x)"} <= set(shown)


def test_the_real_mlflow_gets_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    check_tracker(REGISTRY["tracker"]["mlflow"](experiment="laws"))
    rows = stopped_and_resumed(tmp_path / "run", "trackers.mlflow={experiment='digits'}")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(client.get_experiment_by_name("digits").experiment_id)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["run.epochs"] == "2"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {m.step: m.value for m in history} == {int(r["step"]): float(r["loss"]) for r in rows}
    assert {"valid/pgd10", "test/clean", "loss_p_y_given_x"} <= set(run.data.metrics)


def test_tensorboard_keeps_the_validation_of_an_epoch_that_a_run_resumes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    for step in (0, 3):
        tracker = REGISTRY["tracker"]["tensorboard"]().build()
        tracker.on_begin(TrackedRun(tmp_path, {}, step, 6, {}, lambda _: None))
        if step == 0:
            tracker.on_epoch(3, {"pgd10": 0.5})
        tracker.on_end("preempted")
    lines = (tmp_path / "tensorboard" / "scalars.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"purge": 0}, ["valid/pgd10", 0.5, 2], {"purge": 3},
    ]  # fmt: skip
