"""What a run leaves in its folder, and where the next run may begin."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from toys import (
    toy_recipe,
    toy_registry,
)

from jemkit import (
    ConfigError,
    DataError,
    MisfitError,
    train,
)
from jemkit.runtime.checkpoint import load, load_weights
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder

REGISTRY = toy_registry()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train(toy_recipe(REGISTRY), out, registry=REGISTRY)


def test_a_run_leaves_its_config_metrics_events_curves_samples_and_checkpoints(
    finished: tuple[Path, Any],
) -> None:
    out, summary = finished
    names = {p.name for p in out.iterdir()}
    wanted = {"config.json", "metrics.csv", "events.jsonl", "curves.svg", "samples", "checkpoints"}
    assert wanted <= names
    assert sorted(p.name for p in (out / "samples").iterdir()) == [
        "epoch-0001.png", "epoch-0002.png",
    ]  # fmt: skip
    for picture in (out / "samples").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")
    for picture in (out / "curves.svg", out / "energies.svg"):
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert "validation images; PGD-20" in (out / "energies.svg").read_text()
    assert {p.name for p in (out / "checkpoints").iterdir()} >= {"best", "step-00000012"}
    assert (out.parent / "latest").resolve() == out.resolve()
    assert summary.run == out
    assert summary.best_epoch in (1, 2)


def test_metrics_have_a_row_for_every_step_with_every_term_and_energy(
    finished: tuple[Path, Any],
) -> None:
    rows = RunFolder(finished[0]).metrics()
    assert [int(row["step"]) for row in rows] == list(range(12))
    wanted = {
        "loss", "loss p(x)", "loss p(x~|x)", "loss p(y|x~)", "loss p(y|x)", "E(x)", "E(x+)",
        "E(x-)", "E(x~)", "gap x+ x-", "gap x~ x", "accuracy", "gradient norm", "lr", "images/s",
    }  # fmt: skip
    assert wanted <= set(rows[0])
    weights = {"loss p(x)": 0.45, "loss p(x~|x)": 0.05, "loss p(y|x~)": 0.45, "loss p(y|x)": 0.45}
    for row in rows:
        total = sum(w * float(row[name]) for name, w in weights.items())
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5, abs=1e-6)
        gap = float(row["E(x+)"]) - float(row["E(x-)"])
        assert float(row["gap x+ x-"]) == pytest.approx(gap, abs=1e-6)


def test_events_tell_of_the_start_each_epoch_and_the_end(finished: tuple[Path, Any]) -> None:
    lines = (finished[0] / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [e["event"] for e in events] == ["start", "epoch", "epoch", "end"]
    assert {"accuracy", "pgd10", "step"} <= set(events[1])


@pytest.mark.parametrize("native", [True, False])
def test_a_run_in_a_precision_that_is_emulated_says_so(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    recipe = toy_recipe(REGISTRY, "classifier", "ce", "plain", "run.precision=bf16", "run.epochs=1")
    train(recipe, tmp_path / "run", registry=REGISTRY)
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    warnings = [e["message"] for e in map(json.loads, lines) if e["event"] == "precision"]
    assert [text.partition(":")[0] for text in warnings] == ([] if native else ["run.precision"])
    assert [text for text in caplog.messages if "emulated" in text] == warnings


def test_the_figures_are_of_the_whole_test_split_and_say_how(finished: tuple[Path, Any]) -> None:
    figures = {figure.name: figure for figure in finished[1].figures}
    assert {"clean", "pgd20", "gap_mean", "gap_variance", "gap_signed", "gap_relative"} <= set(
        figures
    )
    assert figures["clean"].n == 30
    assert figures["pgd20"].protocol["radius_px"] == 25.5
    assert figures["pgd20"].protocol["split"] == "test"
    assert finished[1].value("clean") == figures["clean"].value


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_written(
    finished: tuple[Path, Any],
) -> None:
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(ConfigError, match=r"already exists.*--resume"):
        train(toy_recipe(REGISTRY), out, registry=REGISTRY)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run that can be resumed"):
        train(toy_recipe(REGISTRY), tmp_path, registry=REGISTRY, resume=True)


def test_a_run_whose_parts_do_not_fit_writes_nothing(tmp_path: Path) -> None:
    recipe = toy_recipe(REGISTRY, "classifier", "ebjdat")
    with pytest.raises(MisfitError):
        train(recipe, tmp_path / "run", registry=REGISTRY)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_model_are_refused_by_name_and_shape(
    tmp_path: Path, finished: tuple[Path, Any]
) -> None:
    recipe = toy_recipe(REGISTRY, "sadajem", "ebjdat", "plain", "backbone.network.channels=3")
    with pytest.raises(DataError, match=r"size mismatch for network\.first\.weight"):
        train(recipe, tmp_path / "run", registry=REGISTRY, init_from=finished[0])
    assert not (tmp_path / "run").exists()


def test_weights_of_an_earlier_run_are_where_the_next_begins(
    tmp_path: Path, finished: tuple[Path, Any]
) -> None:
    weights = load_weights(finished[0])
    recipe = toy_recipe(REGISTRY, "sadajem", "ebjdat", "plain", "run.epochs=1", "optimizer.lr=1e-9")
    train(recipe, tmp_path / "run", registry=REGISTRY, init_from=finished[0])
    loaded = load_weights(tmp_path / "run" / "checkpoints" / "best")
    torch.testing.assert_close(loaded["head.weight"], weights["head.weight"])


def test_an_average_of_weights_begins_with_those_of_an_earlier_run(
    tmp_path: Path, finished: tuple[Path, Any]
) -> None:
    weights = load_weights(finished[0])
    recipe = toy_recipe(REGISTRY, "sadajem", "ebjdat", "plain", "run.epochs=1", "run.ema_decay=0.9")
    train(recipe, tmp_path / "run", registry=REGISTRY, init_from=finished[0])
    state = load(tmp_path / "run" / "checkpoints" / "step-00000000")
    assert same(state["model"], weights)
    assert same(state["ema"], weights)
