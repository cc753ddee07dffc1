"""What an exported model draws: the samples of its run, also where no image is left."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_runs import averaged_run, clean
from imagefolders import split_folder
from toys import toy_recipe, toy_registry

from jemkit import load, train
from jemkit.config.registry import Registry
from jemkit.errors import ConfigError, DataError, MisfitError
from jemkit.evaluation.export import export
from jemkit.evaluation.sample import draw_samples, sample, sample_request
from jemkit.sampling.fresh import TOGETHER
from jemkit.sampling.moments import MOMENTS
from jemkit.training.model_card import WEIGHTS
from jemkit.training.model_folder import verify
from jemkit.training.plan import plan


@pytest.fixture(scope="module")
def parts() -> Registry:
    return toy_registry()


@pytest.fixture(scope="module")
def averaged(parts: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return averaged_run(parts, tmp_path_factory.mktemp("runs"))


def test_an_exported_model_draws_the_samples_of_its_run(
    averaged: Path, parts: Registry, tmp_path: Path
) -> None:
    folder = export(averaged, out=tmp_path / "model").folder
    ends = [sample(path, registry=parts, n=7, steps=3) for path in (averaged, folder)]
    assert torch.equal(ends[0].pixels, ends[1].pixels)
    assert ends[1].protocol["sha256"] == verify(folder)
    with pytest.raises(MisfitError, match="an exported model has no buffer"):
        sample(folder, registry=parts, n=7, source="buffer")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(DataError, match="SHA-256"):
        sample(folder, registry=parts, n=7, steps=3)


@pytest.mark.parametrize("steps", [0, 3])
def test_sampling_tells_how_far_it_is(averaged: Path, parts: Registry, steps: int) -> None:
    recorded: list[int] = []
    wanted: dict[str, Any] = {"start": None, "source": "chains", "classes": None, "seed": 0}
    request = sample_request(
        averaged, registry=parts, n=TOGETHER + 20, steps=steps, device="cpu", which="best", **wanted
    )
    draw_samples(request, progress=lambda what, done, total: recorded.append(done))
    assert recorded == sorted(recorded)
    assert {TOGETHER // 2 + 10, TOGETHER + 20} <= set(recorded)
    assert len(set(recorded)) == (2 if steps == 0 else 2 * steps)


@pytest.fixture(scope="module")
def begun_from_gaussians(
    parts: Registry, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run whose chains begin from class-wise Gaussians of a folder's images, and that folder."""
    root = tmp_path_factory.mktemp("gaussians")
    data = split_folder(root / "data", n=20)
    overrides = ("backbone.start.use=mixture", "data.use=folder", f"data.dir={data}")
    train(toy_recipe(parts, "sadajem", "ce", "plain", *overrides), root / "run", registry=parts)
    return root / "run", data


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moments"


@pytest.mark.usefixtures("empty_cache")
def test_an_exported_model_samples_where_no_training_image_is_left(
    begun_from_gaussians: tuple[Path, Path],
    parts: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, data = begun_from_gaussians
    wanted = sample(run, registry=parts, n=7, steps=3).pixels
    folder = export(run, out=tmp_path / "model", registry=parts).folder
    hidden = data.rename(data.with_name("hidden"))
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path / "none"))
    try:
        assert torch.equal(sample(folder, registry=parts, n=7, steps=3).pixels, wanted)
        assert load(folder, registry=parts)(torch.rand(2, 1, 8, 8)).shape == (2, 2)
        with pytest.raises(DataError, match=r"--data-dir DIR.*--start uniform"):
            sample(folder, registry=parts, n=7, steps=3, start="gaussian")
        there = {"dir": str(hidden)}
        drawn = sample(folder, registry=parts, n=7, steps=3, start="gaussian", dataset=there)
        assert drawn.pixels.shape == (7, 1, 8, 8)
        (folder / MOMENTS).write_bytes(b"")
        with pytest.raises(DataError, match=rf"{MOMENTS} is missing or damaged"):
            sample(folder, registry=parts, n=7, steps=3)
    finally:
        hidden.rename(data)


def test_an_evaluation_that_does_not_sample_estimates_no_gaussians(
    begun_from_gaussians: tuple[Path, Path], parts: Registry, empty_cache: Path
) -> None:
    run, _ = begun_from_gaussians
    clean(run, parts)
    assert not empty_cache.exists()
    sample(run, registry=parts, n=3, steps=1)
    assert len(list(empty_cache.iterdir())) == 1


def test_a_dry_run_estimates_no_gaussians_and_tells_what_they_take(
    parts: Registry, tmp_path: Path, empty_cache: Path
) -> None:
    data = split_folder(tmp_path / "data", n=20)
    overrides = ("backbone.start.use=mixture", "data.use=folder", f"data.dir={data}")
    planned = plan(toy_recipe(parts, "sadajem", "ce", "plain", *overrides), tmp_path / "run")
    assert planned["start"] == "mixture"
    assert planned["disk of the start"] == f"0.0 MB at most, in {empty_cache}"
    one = r"\d+ checkpoints of [0-9.]+ MB, 0.0 MB of it the replay buffer; pictures and logs"
    assert re.fullmatch(f"[0-9.]+ MB at most: {one}", planned["disk of the run"])
    assert not empty_cache.parent.exists()
    assert not (tmp_path / "run").exists()


def test_a_class_is_sampled_by_its_name_where_the_run_knows_any(
    parts: Registry, tmp_path: Path
) -> None:
    data = [f"data.dir={split_folder(tmp_path / 'images', n=20)}", "data.use=folder"]
    run = tmp_path / "run"
    train(toy_recipe(parts, "sadajem", "ebjdat", "plain", *data), run, registry=parts)
    for path in (run, export(run, out=tmp_path / "model", registry=parts).folder):
        named = sample(path, registry=parts, n=4, steps=1, classes=["dog", "cat"])
        numbered = sample(path, registry=parts, n=4, steps=1, classes=["1", "0"])
        assert torch.equal(named.pixels, numbered.pixels)
        assert named.y is not None
        assert named.y.tolist() == [1, 1, 0, 0]
        with pytest.raises(ConfigError, match=r"'cot': expected .* name \(did you mean 'cat'\?\)"):
            sample(path, registry=parts, n=4, steps=1, classes=["cot"])
