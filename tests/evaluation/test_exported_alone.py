"""An exported or imported model stands alone: no image of a data set is read to open it."""

import shutil
from pathlib import Path

import pytest
import torch
from authors import Authors, made, saved
from PIL import Image
from toys import REGISTRY

from jemkit import load, train
from jemkit.config.recipe import resolve
from jemkit.errors import DataError
from jemkit.evaluation.export import export
from jemkit.evaluation.sample import sample
from jemkit.runtime.files import read_json
from jemkit.training.pretrained import import_checkpoint

CPU = torch.device("cpu")


def images(root: Path, n: int = 6) -> Path:
    """Three classes of 8 px images, for training and for testing."""
    rng = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for k, name in enumerate(("cat", "dog", "fox")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(60, (8, 8, 3), generator=rng) + 60 * k
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder of images with a Gaussian a class, exported; its images are gone."""
    at = tmp_path_factory.mktemp("alone")
    named = {
        "data": {"use": "folder", "dir": str(images(at / "data"))},
        "backbone": {"use": "jempp", "network": {"use": "mlp-8-1"}, "steps": 1},
        "objective": {"use": "jem"},
        "run": {"epochs": 1, "batch_size": 6, "eval_images": 3},
    }
    overrides = [
        "backbone.buffer.capacity=12", "backbone.start.use=mixture", "backbone.sampler.use=sgld",
    ]  # fmt: skip
    train(resolve(REGISTRY, named=named, overrides=overrides), at / "run", registry=REGISTRY)
    folder = export(at / "run", out=at / "model", registry=REGISTRY).folder
    export(at / "run", out=at / "bare", registry=REGISTRY, moments=False)
    shutil.rmtree(at / "data")
    return folder


def test_an_exported_model_gives_logits_and_samples_without_any_image(model: Path) -> None:
    assert sorted(read_json(model / "config.json")["sha256"]) == [
        "model.safetensors", "moments.safetensors",
    ]  # fmt: skip
    with torch.no_grad():
        assert load(model, registry=REGISTRY)(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    drawn = sample(model, registry=REGISTRY, n=4, steps=2)
    assert drawn.pixels.shape == (4, 3, 8, 8)


def test_without_moments_it_gives_logits_and_its_chains_need_the_images(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path / "cache"))
    bare = model.parent / "bare"
    assert not (bare / "moments.safetensors").exists()
    with torch.no_grad():
        x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        assert load(bare, registry=REGISTRY)(x).equal(load(model, registry=REGISTRY)(x))
    with pytest.raises(DataError, match="--data-dir"):
        sample(bare, registry=REGISTRY, n=2, steps=1)
    assert sample(bare, registry=REGISTRY, n=2, steps=1, start="uniform").pixels.shape[0] == 2


def test_changed_moments_are_refused(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    data = bytearray((folder / "moments.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "moments.safetensors").write_bytes(data)
    for read in (
        lambda: load(folder, registry=REGISTRY),
        lambda: sample(folder, registry=REGISTRY),
    ):
        with pytest.raises(DataError, match=r"moments\.safetensors is missing or damaged"):
            read()


def test_an_imported_model_gives_logits_where_its_data_set_is_not(tmp_path: Path) -> None:
    theirs = made(Authors)
    imported = import_checkpoint(saved(tmp_path / "a.pt", theirs), "mebm", REGISTRY)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load(imported.folder, registry=REGISTRY).scores(x)
        torch.testing.assert_close(ours.logits, theirs(2 * x - 1), atol=1e-5, rtol=1e-5)
    drawn = sample(imported.folder, registry=REGISTRY, n=2, steps=1, start="uniform")
    assert drawn.pixels.shape == (2, 3, 32, 32)
    with pytest.raises(DataError, match="--data-dir"):  # M-EBM's Gaussian is of the images
        sample(imported.folder, registry=REGISTRY, n=2, steps=1)
