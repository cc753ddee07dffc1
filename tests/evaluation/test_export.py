"""Exported models: judged as their run, whole or not at all, with a card of their figures."""

import json
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from exported_runs import CPU, averaged_run, clean, copied
from imagefolders import split_folder
from toys import REGISTRY, toy_recipe, toy_registry
from typer.testing import CliRunner

from jemkit import evaluate, load, train
from jemkit.attacks.pixel_model import pixel_model
from jemkit.config.eval_settings import settings_of
from jemkit.config.registry import Registry
from jemkit.errors import ConfigError, DataError
from jemkit.evaluation.evaluate import judge
from jemkit.evaluation.export import export
from jemkit.evaluation.sample import sample
from jemkit.evaluation.subjects import subject_at
from jemkit.metrics import record as records
from jemkit.runtime import checkpoint
from jemkit.runtime.extras import install
from jemkit.runtime.files import file_hash, load_tensors, read_json, write_json
from jemkit.runtime.pytree import same
from jemkit.training.model_card import CARD, CONFIG, WEIGHTS
from jemkit.training.model_folder import FORMAT, push, verify, write_model
from jemkit_cli.foreign import export_model


@pytest.fixture(scope="module")
def parts() -> Registry:
    return toy_registry()


@pytest.fixture(scope="module")
def averaged(parts: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return averaged_run(parts, tmp_path_factory.mktemp("runs"))


def test_an_exported_model_is_the_best_checkpoint_averaged(averaged: Path, tmp_path: Path) -> None:
    exported = export(averaged, out=tmp_path / "model")
    state = checkpoint.load(averaged / "checkpoints" / "best")
    weights = load_tensors(exported.folder / WEIGHTS)
    assert exported.weights == "averaged"
    assert same(weights, state["ema"])
    assert not same(weights, state["model"])


def test_an_exported_model_is_judged_as_its_run(
    averaged: Path, parts: Registry, tmp_path: Path
) -> None:
    exported = export(averaged, out=tmp_path / "model")
    ours, theirs = subject_at(averaged, parts, CPU), subject_at(exported.folder, parts, CPU)
    x = ours.test.unit()
    with torch.no_grad():
        assert torch.equal(ours.model.eval()(x), theirs.model.eval()(x))
    assert clean(averaged, parts) == clean(exported.folder, parts)
    assert theirs.about["sha256"] == exported.sha256 == verify(exported.folder)


def test_the_last_checkpoint_is_exported_on_demand(averaged: Path, tmp_path: Path) -> None:
    exported = export(averaged, out=tmp_path / "model", which="last")
    assert exported.checkpoint.startswith("step-")


def test_the_config_says_what_it_is(averaged: Path, tmp_path: Path) -> None:
    exported = export(averaged, out=tmp_path / "model")
    config = read_json(exported.folder / CONFIG)
    assert config["format"] == FORMAT
    assert config["jemkit"]
    assert config["recipe"] == read_json(averaged / CONFIG)["recipe"]
    assert config["sha256"] == {WEIGHTS: file_hash(exported.folder / WEIGHTS)}
    assert config["source"]["checkpoint"] == "best"


@pytest.mark.parametrize("inside", ["", "checkpoints/best"])
def test_no_path_of_an_exported_config_names_the_user(
    inside: str, parts: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    train(toy_recipe(parts), tmp_path / "first", registry=parts)
    begun = tmp_path / "second"
    train(toy_recipe(parts), begun, registry=parts, init_from=tmp_path / "first" / inside)
    config = export(begun, out=tmp_path / "model", registry=parts).folder / CONFIG
    assert read_json(config)["init_from"] == {"given": "first", "path": "first"}
    assert str(tmp_path) not in config.read_text()


@pytest.mark.parametrize("origins", [None, [], {"run.seed": None}])
def test_damaged_origins_do_not_keep_a_run_from_being_exported(
    parts: Registry, tmp_path: Path, origins: Any
) -> None:
    run = tmp_path / "run"
    train(toy_recipe(parts), run, registry=parts)
    write_json(run / CONFIG, {**read_json(run / CONFIG), "origins": origins})
    exported = read_json(export(run, out=tmp_path / "model", registry=parts).folder / CONFIG)
    assert exported["origins"] == origins


def test_a_number_that_is_not_finite_in_a_runs_config_is_an_error(
    parts: Registry, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(toy_recipe(parts), run, registry=parts)
    config = {**read_json(run / CONFIG), "note": float("nan")}
    (run / CONFIG).write_text(json.dumps(config))
    with pytest.raises(DataError, match="not finite"):
        export(run, out=tmp_path / "model", registry=parts)


def test_origins_in_an_exported_config_name_files_without_their_folders(
    parts: Registry, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(toy_recipe(parts), run, registry=parts)
    config = read_json(run / CONFIG)
    origins = {"run.seed": str(tmp_path / "mine.toml"), "run.epochs": "--set run.epochs=4/2"}
    write_json(run / CONFIG, {**config, "origins": {**config["origins"], **origins}})
    exported = read_json(export(run, out=tmp_path / "model", registry=parts).folder / CONFIG)
    assert exported["origins"]["run.seed"] == "mine.toml"
    assert exported["origins"]["run.epochs"] == "--set run.epochs=4/2"


def test_the_card_has_the_figures_of_these_weights_alone(
    averaged: Path, parts: Registry, tmp_path: Path
) -> None:
    run = copied(averaged, tmp_path)
    judge(subject_at(run, parts, CPU), settings_of({"only": ("accuracy",)}), parts)
    exported = export(run, out=tmp_path / "model")
    card = (exported.folder / CARD).read_text()
    figure = read_json(run / "evaluation.json")["figures"][0]
    assert exported.figures == len(records.load(run).figures)
    assert f"| clean | {figure['value']:.4g} |" in card
    assert exported.sha256 in card
    assert "evaluator accuracy" in card
    assert "split test" in card
    assert "radius_px" in card
    other = read_json(run / "evaluation.json")
    other["subject"]["sha256"] = "0" * 64
    other["format"] = 1  # of records without hashes of their own
    del other["sha256"]
    write_json(run / "evaluation.json", other)
    exported = export(run, out=tmp_path / "again")
    assert exported.figures == 0
    assert "of other weights" in (exported.folder / CARD).read_text()


def test_the_card_has_no_figure_of_another_data_set(
    averaged: Path, parts: Registry, tmp_path: Path
) -> None:
    run = copied(averaged, tmp_path)
    requested = settings_of({"only": ("accuracy",)})
    root = split_folder(tmp_path / "data", classes=("a", "b", "c"), n=4)
    judge(
        subject_at(run, parts, CPU, dataset={"use": "folder", "dir": str(root)}), requested, parts
    )
    assert records.load(run).subject["data"] == "folder"
    folder = export(run, out=tmp_path / "model").folder
    assert read_json(folder / "figures.json")["subject"]["data"] == "toy"  # what training measured
    (saved,) = records.beside(run)
    (run / f"{saved}.json").unlink()
    assert (
        "other images than those of toy"
        in (export(run, out=tmp_path / "again").folder / CARD).read_text()
    )


def test_the_card_has_no_figure_of_another_folder_of_images(
    parts: Registry, tmp_path: Path
) -> None:
    roots = [split_folder(tmp_path / name, n=n) for name, n in (("one", 20), ("two", 25))]
    run, requested = tmp_path / "run", settings_of({"only": ("accuracy",)})
    data = [f"data.dir={roots[0]}", "data.use=folder", "backbone.buffer.capacity=60"]
    train(toy_recipe(parts, "sadajem", "ebjdat", "plain", *data), run, registry=parts)
    other = {"use": "folder", "dir": str(roots[1])}
    judge(subject_at(run, parts, CPU, dataset=other), requested, parts)
    assert records.load(run).protocol["images"] == 50
    folder = export(run, out=tmp_path / "model", registry=parts).folder
    assert read_json(folder / "figures.json")["protocol"]["images"] == 40
    (saved,) = records.beside(run)
    (run / f"{saved}.json").unlink()
    assert export(run, out=tmp_path / "again", registry=parts).figures == 0


def test_a_figure_of_part_of_the_images_says_so_in_the_card(
    averaged: Path, parts: Registry, tmp_path: Path
) -> None:
    run = copied(averaged, tmp_path)
    few = settings_of({"only": ("accuracy",), "max_images": 5})
    judge(subject_at(run, parts, CPU), few, parts)
    card = (export(run, out=tmp_path / "model").folder / CARD).read_text()
    assert "| clean (NON-STANDARD protocol) |" in card


def test_a_run_that_was_not_judged_has_a_card_without_figures(
    averaged: Path, tmp_path: Path
) -> None:
    run = copied(averaged, tmp_path)
    (run / "evaluation.json").unlink()
    exported = export(run, out=tmp_path / "model")
    assert "No figure was measured yet" in (exported.folder / CARD).read_text()
    assert (exported.folder / CARD).read_text().startswith("---\nlibrary_name: jemkit\n")


def test_the_folder_that_the_command_runs_in_is_not_replaced(
    averaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (Path(), tmp_path):
        with pytest.raises(ConfigError, match="is the working folder"):
            export(averaged, out=out)
    assert not list(tmp_path.iterdir())


def test_the_default_folder_is_in_the_run(averaged: Path, tmp_path: Path) -> None:
    run = copied(averaged, tmp_path)
    assert export(run).folder == run / "export"
    with pytest.raises(ConfigError, match="is not empty"):
        export(run)


def test_a_folder_with_something_in_it_is_left_alone(averaged: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("model", "file"):
        with pytest.raises(ConfigError, match="is not empty"):
            export(averaged, out=tmp_path / name)
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert export(averaged, out=tmp_path / "empty").folder.is_dir()


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_model(tmp_path / "model", {"recipe": {}}, {"a": torch.zeros(1)}, "")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_is_refused(averaged: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a run of jemkit"):
        export(tmp_path)
    with pytest.raises(DataError, match="is a checkpoint; give its run"):
        export(averaged / "checkpoints" / "best")
    model = export(averaged, out=tmp_path / "model").folder
    with pytest.raises(DataError, match="is an exported model already"):
        export(model)
    run = copied(averaged, tmp_path)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(DataError, match="has no complete best checkpoint"):
        export(run)


def test_a_damaged_checkpoint_is_refused(averaged: Path, tmp_path: Path) -> None:
    run = copied(averaged, tmp_path)
    weights = run / "checkpoints" / "best" / checkpoint.MODEL
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DataError, match="is damaged"):
        export(run)
    assert not (run / "export").exists()


def test_a_changed_model_is_not_verified(averaged: Path, tmp_path: Path) -> None:
    folder = export(averaged, out=tmp_path / "model").folder
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(DataError, match="missing or damaged"):
        verify(folder)
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), "format": 99})
    with pytest.raises(DataError, match="export format 99"):
        verify(folder)


def test_push_without_its_package_names_the_extra(
    averaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(averaged, out=tmp_path / "model").folder
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=re.escape(install("hub"))):
        push(folder, "me/model")


class Hub:
    """The part of huggingface_hub that a push uses."""

    def __init__(self, refuses: bool = False) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refuses = refuses

    def HfApi(self) -> "Hub":
        return self

    def create_repo(self, repo: str, **how: Any) -> None:
        if self.refuses:
            raise OSError("401: log in")
        self.calls.append((repo, how))

    def upload_folder(self, **how: Any) -> str:
        self.calls.append(("upload", how))
        return f"https://hub/{how['repo_id']}"


@pytest.mark.parametrize("refuses", [False, True])
def test_push_uploads_the_folder_or_says_why_not(
    refuses: bool, averaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, module = Hub(refuses), types.ModuleType("huggingface_hub")
    module.HfApi = hub.HfApi  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    folder = export(averaged, out=tmp_path / "model").folder
    if refuses:
        with pytest.raises(DataError, match="was not pushed to me/model: 401: log in"):
            push(folder, "me/model")
        return
    assert push(folder, "me/model") == "https://hub/me/model"
    assert hub.calls[-1] == ("upload", {"repo_id": "me/model", "folder_path": str(folder)})


def test_the_command_tells_in_json_what_it_wrote(averaged: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(export_model)
    where = ["--out", str(tmp_path / "model")]
    done = CliRunner().invoke(app, [str(averaged), *where, "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["folder"] == str(tmp_path / "model")
    assert printed["sha256"] == verify(tmp_path / "model")
    again = CliRunner().invoke(app, [str(averaged), *where])
    assert again.exit_code == 3
    assert "is not empty" in again.stderr


def test_jemkits_own_parts_are_enough_to_read_a_card(averaged: Path, tmp_path: Path) -> None:
    """A guest's data set is named in the card, and its absence is told when it is judged."""
    folder = export(averaged, out=tmp_path / "model").folder
    with pytest.raises(ConfigError, match="no dataset 'toy'"):
        subject_at(folder, REGISTRY, CPU)


def test_a_run_is_loaded_as_its_exported_model_is(
    averaged: Path, parts: Registry, tmp_path: Path
) -> None:
    best = averaged / "checkpoints" / "best"
    paths = averaged, best, export(averaged, out=tmp_path / "model").folder
    first, *others = [load(path, registry=parts) for path in paths]
    x = parts["dataset"]["toy"]().load("test").unit()
    with torch.no_grad():
        assert all(torch.equal(first(x), model(x)) for model in others)
    drawn = [sample(path, registry=parts, n=4, steps=1, device="cpu") for path in (averaged, best)]
    assert torch.equal(drawn[0].pixels, drawn[1].pixels)
    assert drawn[0].protocol == drawn[1].protocol
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is not a run of jemkit and not an exported model"):
        load(tmp_path / "empty", registry=parts)


def test_images_of_bytes_as_floats_are_refused_by_a_loaded_model_and_not_while_it_is_judged(
    averaged: Path, parts: Registry
) -> None:
    model = load(averaged, registry=parts)
    images = parts["dataset"]["toy"]().load("test")
    x = images.unit()
    with torch.no_grad():
        for wrong in (255 * x, (255 * x).half(), (255 * x).long()):
            with pytest.raises(DataError, match=r"expected floats in \[0, 1\], or uint8 in 0..255"):
                model(wrong)
            with pytest.raises(DataError, match="expected floats in"):
                model.scores(wrong)
        whole = (255 * x).round().to(torch.uint8)
        assert torch.allclose(model(whole), model(whole.float() / 255))
        assert model(x + torch.randn_like(x)).isfinite().all()  # noise may go beyond
        one = torch.func.vmap(lambda image: model(image[None])[0])(x[:2])
        assert torch.allclose(one, model(x[:2]), atol=1e-5)
    record = evaluate(model, images, registry=parts, only=("accuracy",), n_classes=3)
    assert record.value("clean") == clean(averaged, parts)
    assert pixel_model(model)(255 * x).isfinite().all()


def test_pictures_behind_a_link_are_not_exported(averaged: Path, tmp_path: Path) -> None:
    run = shutil.copytree(averaged, tmp_path / "run")
    shutil.move(run / "samples", tmp_path / "elsewhere")
    (run / "samples").symlink_to(tmp_path / "elsewhere")
    assert (export(averaged, out=tmp_path / "whole").folder / "samples.png").exists()
    assert not (export(run, out=tmp_path / "model").folder / "samples.png").exists()
