"""`jemkit.load` and `from_pretrained`: a trained model in one line, also where no image is left."""

import copy
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_runs import averaged_run
from imagefolders import split_folder
from toys import gen, toy_recipe, toy_registry

import jemkit as api
from jemkit import ConfigError, DataError, Images, MisfitError, from_pretrained, load, train
from jemkit.config.registry import Registry
from jemkit.errors import UsageError
from jemkit.evaluation.export import export
from jemkit.evaluation.sample import sample
from jemkit.evaluation.subjects import subject_at, subject_of
from jemkit.runtime.extras import install
from jemkit.runtime.files import read_json, write_tensors
from jemkit.splits import Splits
from jemkit.training import pinned, restore
from jemkit.training.model_folder import FILES, verify


@pytest.fixture(scope="module")
def parts() -> Registry:
    return toy_registry()


@pytest.fixture(scope="module")
def run(parts: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return averaged_run(parts, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def folder(run: Path, parts: Registry) -> Path:
    return export(run, out=run.parent / "model", license="mit", registry=parts).folder


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.rand(5, 1, 8, 8, generator=gen())


def test_a_loaded_model_is_a_module_with_logits_energies_and_probabilities(
    run: Path, folder: Path, parts: Registry, x: torch.Tensor
) -> None:
    for path in (run, run / "checkpoints" / "best", folder, str(folder)):
        model = load(path, registry=parts)
        assert not model.training
        assert (model.shape, model.n_classes) == ((1, 8, 8), 3)
        with torch.no_grad():
            scores, y = model.scores(x), torch.tensor([0, 1, 2, 0, 1])
            assert torch.equal(model(x), scores.logits)
            assert torch.equal(model.logits(x), scores.logits)
            assert torch.equal(model.energy(x), scores.energy)
            assert torch.equal(model.energy(x, y), scores.joint(y))
            assert torch.equal(model.energy(x, 2), scores.joint(torch.full((5,), 2)))
            proba = model.predict_proba(x)
        torch.testing.assert_close(proba.sum(1), torch.ones(5))
        assert torch.equal(proba.argmax(1), scores.logits.argmax(1))


def test_images_of_another_precision_are_read_in_the_models(
    folder: Path, parts: Registry, x: torch.Tensor
) -> None:
    model = load(folder, registry=parts)
    with torch.no_grad():
        assert torch.equal(model(x.double()), model(x))


def test_labels_and_images_that_cannot_be_are_refused(
    folder: Path, parts: Registry, x: torch.Tensor
) -> None:
    model = load(folder, registry=parts)
    with pytest.raises(DataError, match="y has 2 labels for 5 images"):
        model.energy(x, torch.tensor([0, 1]))
    with pytest.raises(DataError, match=r"label .*3"):
        model.energy(x, 3)
    with pytest.raises(DataError, match=r"expected images as a tensor \[B, C, H, W\]"):
        model(x[0])
    with pytest.raises(DataError, match=r"images \[3, 8, 8\]: the model takes \[1, 8, 8\]"):
        model(x.expand(5, 3, 8, 8))
    with pytest.raises(DataError, match=r"images \[1, 8, 7\]: the model takes \[1, 8, 8\]"):
        model(x[..., :7])
    with pytest.raises(DataError, match="got ndarray"):
        model(x.numpy())  # type: ignore[arg-type]


def test_samples_are_those_of_the_command(run: Path, folder: Path, parts: Registry) -> None:
    model = load(folder, registry=parts)
    drawn = model.sample(7, seed=3, steps=2)
    assert (drawn.shape, float(drawn.min()) >= 0, float(drawn.max()) <= 1) == (
        (7, 1, 8, 8), True, True,
    )  # fmt: skip
    assert torch.equal(drawn, sample(run, registry=parts, n=7, seed=3, steps=2).pixels)
    assert torch.equal(drawn, load(run, registry=parts).sample(7, seed=3, steps=2))
    assert not torch.equal(drawn, model.sample(7, seed=4, steps=2))
    classwise = sample(run, registry=parts, n=6, steps=2, classes=["all"]).pixels
    assert torch.equal(classwise, model.sample(6, label="all", steps=2))
    assert torch.equal(classwise, model.sample(6, steps=2, y=torch.arange(6) // 2))
    uniform = sample(run, registry=parts, n=6, steps=0, start="uniform").pixels
    assert torch.equal(uniform, model.sample(6, steps=0, start="uniform"))
    own = model.sample(4, gen(), steps=1, y=torch.tensor([0, 1, 2, 0]))  # of a generator
    assert torch.equal(own, model.sample(4, gen(), steps=1, y=torch.tensor([0, 1, 2, 0])))


def test_samples_that_cannot_be_are_refused(folder: Path, parts: Registry) -> None:
    model = load(folder, registry=parts)
    with pytest.raises(UsageError, match="0 images: expected 1 or more"):
        model.sample(0)
    with pytest.raises(ConfigError, match=r"class '3': expected a number of 0\.\.2"):
        model.sample(2, label=3)
    with pytest.raises(ConfigError, match="pass one of them"):
        model.sample(2, label=1, y=torch.tensor([0, 1]))
    with pytest.raises(DataError, match="y has 3 labels for 2 images"):
        model.sample(2, y=torch.tensor([0, 1, 2]))
    with pytest.raises(ConfigError, match="no start 'unform'"):
        model.sample(2, start="unform")


def test_labels_and_starts_of_other_types(folder: Path, parts: Registry) -> None:
    model = load(folder, registry=parts)
    other: Any = np.int64(2)
    assert torch.equal(model.sample(2, label=other, steps=1), model.sample(2, label=2, steps=1))
    other = 2.0
    with pytest.raises(ConfigError, match=r"class '2\.0': expected a number of 0\.\.2"):
        model.sample(2, label=other)
    other = api.Uniform()
    with pytest.raises(ConfigError, match=r"start: got Uniform, .* have `build`"):
        model.sample(2, start=other)


def test_a_model_samples_on_its_device_however_that_is_named(folder: Path, parts: Registry) -> None:
    """A tensor on "cuda" is on cuda:0, one on "cpu:0" on cpu."""
    drawn = load(folder, registry=parts, device="cpu:0").sample(2, steps=1)
    assert torch.equal(drawn, load(folder, registry=parts).sample(2, steps=1))


def test_a_checkpoint_or_a_device_that_does_not_exist_is_refused(
    run: Path, folder: Path, parts: Registry
) -> None:
    newest: Any = "newest"
    with pytest.raises(ConfigError, match="which='newest': a run has the checkpoints best and"):
        load(run, registry=parts, which=newest)
    with pytest.raises(ConfigError, match="only a run has a last checkpoint"):
        load(folder, registry=parts, which="last")
    with pytest.raises(ConfigError, match="device 'gpu': expected auto, cpu or cuda"):
        load(run, registry=parts, device="gpu")


def test_a_copy_samples_by_its_own_weights(folder: Path, parts: Registry) -> None:
    model = load(folder, registry=parts)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.head.weight.zero_()  # type: ignore[union-attr, operator]
    before = model.sample(3, steps=2)
    assert not torch.equal(other.sample(3, steps=2), before)
    assert torch.equal(model.sample(3, steps=2), before)


def test_where_a_model_comes_from_is_no_part_of_its_identity(
    run: Path, folder: Path, parts: Registry
) -> None:
    data = parts["dataset"]["toy"]()
    ids = {subject_of(load(p, registry=parts), data).about["sha256"] for p in (run, folder)}
    assert len(ids) == 1


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_is_loaded_where_its_images_are_not(
    parts: Registry, tmp_path: Path, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an earlier version, which has no shape, by the states of its buffer."""
    if not recorded:
        pin = pinned.pin

        def shapeless(splits: Splits) -> tuple[pinned.Table, pinned.Details]:
            table, details = pin(splits)
            return table.model_copy(update={"shape": None}), details

        monkeypatch.setattr(pinned, "pin", shapeless)
    data = split_folder(tmp_path / "data", n=8)
    overrides = ("data.use=folder", f"data.dir={data}", "backbone.start.use=gaussian")
    run = tmp_path / "run"
    train(toy_recipe(parts, "sadajem", "ce", "plain", *overrides), run, registry=parts)
    x = torch.rand(2, 1, 8, 8, generator=gen())
    before, drawn = load(run, registry=parts)(x), load(run, registry=parts).sample(2, steps=1)
    shutil.rmtree(data)
    model = load(run, registry=parts)
    assert torch.equal(model(x), before)
    assert torch.equal(model.sample(2, steps=1), drawn)  # the Gaussians are in the cache
    saved = model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(saved, registry=parts).sample(2, steps=1), drawn)


def test_weights_alone_need_a_network_and_say_for_which_images_they_are(tmp_path: Path) -> None:
    parts = api.installed(third_party=False)
    part, named = parts["network"].named("mlp-8-1")
    model = api.LogSumExpEnergy(part.model_validate(named).build((1, 8, 8)), 10)
    path = tmp_path / "mine.safetensors"
    write_tensors(path, model.state_dict())
    x = torch.rand(3, 1, 8, 8, generator=gen())
    for how in ({}, {"dataset": "digits"}, {"shape": [1, 8, 8]}):
        loaded = load(path, network="mlp-8-1", registry=parts, **how)  # type: ignore[arg-type]
        assert (tuple(loaded.shape), loaded.n_classes) == ((1, 8, 8), 10)
        assert torch.equal(loaded(x), model(2 * x - 1).logits)
    with pytest.raises(DataError, match="with the shape= of their images"):
        loaded(x[:, :, 1:])
    with pytest.raises(MisfitError, match="cannot be sampled"):
        loaded.sample(1)
    with pytest.raises(MisfitError, match="has no recipe"):
        loaded.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match="pass one of them"):
        load(path, network="mlp-8-1", dataset="digits", shape=(1, 8, 8), registry=parts)
    with pytest.raises(ConfigError, match="specify their network"):
        load(path, registry=parts)
    with pytest.raises(DataError, match="do not fit the model"):
        load(path, network="mlp-8-1", dataset="cifar10", registry=parts)
    with pytest.raises(ConfigError, match="no registered data set has images that fit"):
        load(path, network="mlp-9-1", registry=parts)
    with pytest.raises(ConfigError, match="the data set folder has no fixed size"):
        load(path, network="mlp-8-1", dataset="folder", registry=parts)
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "none", registry=parts)
    (tmp_path / "mine.pt").write_bytes(b"x")
    with pytest.raises(DataError, match="jemkit import"):
        load(tmp_path / "mine.pt", network="mlp-8-1", registry=parts)


def test_a_saved_model_is_the_exported_one(
    run: Path, folder: Path, parts: Registry, tmp_path: Path
) -> None:
    saved = load(run, registry=parts).save_pretrained(tmp_path / "of-run", license="mit")
    assert verify(saved) == verify(folder)
    for name in ("config.json", "figures.json"):
        assert read_json(saved / name) == read_json(folder / name)
    again = from_pretrained(saved, registry=parts).save_pretrained(str(tmp_path / "copy"))
    contents = {p.name: p.read_bytes() for p in saved.iterdir()}
    assert {p.name: p.read_bytes() for p in again.iterdir()} == contents
    relicensed = load(saved, registry=parts).save_pretrained(tmp_path / "other", license="cc0-1.0")
    assert 'license: "cc0-1.0"' in (relicensed / "README.md").read_text()
    assert "The figures are in `figures.json`" in (relicensed / "README.md").read_text()
    with pytest.raises(ConfigError, match="is not empty"):
        load(saved, registry=parts).save_pretrained(again)
    with pytest.raises(ConfigError, match="expected an identifier"):
        load(saved, registry=parts).save_pretrained(tmp_path / "new", license="My Licence")


@pytest.mark.parametrize("exported", [True, False])
def test_changed_weights_are_saved_without_the_figures_of_the_others(
    run: Path, folder: Path, parts: Registry, tmp_path: Path, exported: bool, x: torch.Tensor
) -> None:
    model = load(folder if exported else run, registry=parts)
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    saved = model.save_pretrained(tmp_path / "tuned")
    again = from_pretrained(saved, registry=parts)
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.sample(2, steps=1), model.sample(2, steps=1))
    assert not (saved / "figures.json").exists()
    card = (saved / "README.md").read_text()
    assert "the weights were changed after they were loaded" in card
    assert "No figure of these weights was measured yet" in card


def test_a_model_whose_checkpoint_is_gone_is_not_called_changed(
    run: Path, parts: Registry, tmp_path: Path, x: torch.Tensor
) -> None:
    copied = shutil.copytree(run, tmp_path / "run", symlinks=True)
    model = load(copied, registry=parts)
    shutil.rmtree(copied / "checkpoints")
    saved = model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(saved, registry=parts)(x), model(x))
    card = (saved / "README.md").read_text()
    assert "the weights were changed after" not in card
    assert "the checkpoint is gone, so the weights could not be compared with it" in card
    with pytest.raises(DataError, match=r"has no complete best checkpoint$"):  # nor another
        load(copied, registry=parts)


class Hub:
    """The part of huggingface_hub that a download uses."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, list[Any]()

    def snapshot_download(self, repo: str, *, revision: Any, allow_patterns: list[str]) -> str:
        self.calls.append((repo, revision, allow_patterns))
        if repo != "me/model":
            raise FileNotFoundError(f"404 for {repo}")
        return str(self.folder)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Its folder has links to files elsewhere, as the hub's cache has."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    module, fake = types.ModuleType("huggingface_hub"), Hub(snapshot)
    module.snapshot_download = fake.snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return fake


def test_a_model_comes_from_the_hub(
    hub: Hub, folder: Path, parts: Registry, x: torch.Tensor
) -> None:
    model = from_pretrained("me/model", revision="v1", registry=parts)
    assert torch.equal(model(x), load(folder, registry=parts)(x))
    assert hub.calls == [("me/model", "v1", [*FILES])]
    assert not any(name.endswith((".py", ".bin", ".pt", ".pkl")) for name in FILES)
    assert torch.equal(from_pretrained(folder, registry=parts)(x), model(x))
    assert len(hub.calls) == 1
    with pytest.raises(DataError, match="you/none is not a folder here, and it was not downl"):
        from_pretrained("you/none", registry=parts)
    with pytest.raises(DataError, match="is neither a folder nor the name of a repository"):
        from_pretrained("https://hub/me/model", registry=parts)
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="me/model is not an exported model of jemkit"):
        from_pretrained("me/model", registry=parts)


def test_a_changed_download_is_refused(hub: Hub, parts: Registry) -> None:
    weights = hub.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    with pytest.raises(DataError, match="missing or damaged"):
        from_pretrained("me/model", registry=parts)


def test_the_hub_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError) as error:
        from_pretrained("me/model")
    assert install("hub") in str(error.value)
    assert "me/model is not a folder here" in str(error.value)


def test_the_splits_of_a_run_are_known_and_those_of_other_models_are_not(
    run: Path, parts: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert subject_at(run, parts, torch.device("cpu")).known_splits
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    images = Images(torch.rand(2, 1, 8, 8, generator=gen()), torch.tensor([0, 1]))
    assert not subject_of(module, images).known_splits
    monkeypatch.setattr(restore, "read", lambda *_: None)  # an import, or a run of jemkit 0.1
    assert not subject_at(run, parts, torch.device("cpu")).known_splits
