"""Statistics of a reference set: written once, read as data, and refused where they do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import jemkit, one_line
from pydantic import ValidationError
from torch import Tensor

from jemkit import Context, Images
from jemkit.attacks.base import Threat
from jemkit.errors import ConfigError, DataError, Preempted
from jemkit.runtime.files import write_tensors
from jemkit.runtime.rng import generator
from jemkit_plugins.generation import evaluator as evaluator_module
from jemkit_plugins.generation import features as feature_module
from jemkit_plugins.generation import fid, statistics
from jemkit_plugins.generation.evaluator import Generation
from jemkit_plugins.generation.features import INCEPTION, Extracted, Features

CPU = torch.device("cpu")


def pixels(sha: str = "ab" * 32) -> Features:
    """Four pixel sums as features."""

    def extract(x: Tensor) -> Extracted:
        return Extracted(x.float().flatten(1).unflatten(1, (4, -1)).mean(2))

    return Features(INCEPTION, extract, {"extractor": "pixels", "sha256": sha, "weights": "known"})


def images(n: int = 2300, seed: int = 0) -> Images:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 1, 4, 4), dtype=torch.uint8, generator=rng)
    return Images(x, torch.zeros(n, dtype=torch.long))


def context(work: Path | None = None, **more: Any) -> Context:
    return Context(generator(CPU, 0), Threat("Linf", 0.0), batch_size=400, work=work, **more)


def made(work: Path | None = None, **more: Any) -> statistics.Statistics:
    return statistics.measured(images(), pixels(), context(work, **more), {"dataset": "made"})


def test_statistics_are_the_moments_of_the_features(tmp_path: Path) -> None:
    result = made()
    rows = pixels().extract(images().x).features.double()
    assert torch.allclose(result.moments.mean, rows.mean(0))
    assert torch.allclose(result.moments.covariance, rows.T.cov())
    statistics.write(tmp_path / "s.safetensors", result)
    again = statistics.read(tmp_path / "s.safetensors")
    assert again.about == result.about
    assert again.about["count"] == 2300
    assert torch.equal(again.moments.scatter, result.moments.scatter)
    assert fid.frechet(again.moments, result.moments) == pytest.approx(0.0, abs=1e-6)


def test_an_interrupted_computation_continues(tmp_path: Path) -> None:
    polls = iter(range(9))
    with pytest.raises(Preempted):
        made(tmp_path, stop=lambda: next(polls) >= 1)
    (piece,) = tmp_path.rglob("0*.safetensors")
    before = piece.stat().st_mtime_ns
    result = made(tmp_path)
    assert piece.stat().st_mtime_ns == before
    assert torch.equal(result.moments.scatter, made().moments.scatter)


def test_statistics_of_other_features_or_shapes_are_refused() -> None:
    result = made()
    result.check(pixels(), (1, 4, 4))
    with pytest.raises(ConfigError, match=r"SHA-256 abababab.*cdcdcdcd.*jemkit fid-stats"):
        result.check(pixels("cd" * 32), (1, 4, 4))
    with pytest.raises(ConfigError, match=r"images \[1, 4, 4\], and the samples are \[3, 8, 8\]"):
        result.check(pixels(), (3, 8, 8))


@pytest.mark.parametrize("fault", ["other", "nan", "shape", "about", "text", "missing"])
def test_a_file_of_anything_else_is_refused(tmp_path: Path, fault: str) -> None:
    path, result = tmp_path / "s.safetensors", made()
    statistics.write(path, result)
    whole = {
        "n": torch.tensor(2300), "mean": result.moments.mean, "scatter": result.moments.scatter,
        "about": torch.frombuffer(bytearray(json.dumps(result.about).encode()), dtype=torch.uint8),
    }  # fmt: skip
    match fault:
        case "other":
            write_tensors(path, {"weights": torch.zeros(2)})
        case "nan":
            write_tensors(path, {**whole, "mean": torch.full((4,), torch.nan)})
        case "shape":
            write_tensors(path, {**whole, "scatter": torch.zeros(3, 4)})
        case "about":
            write_tensors(path, {**whole, "about": torch.tensor(list(b"{}"), dtype=torch.uint8)})
        case "text":
            path.write_text("none")
        case "missing":
            path.unlink()
    with pytest.raises(DataError, match=r"s\.safetensors"):
        statistics.read(path)


def test_the_extrapolated_distance_of_samples_of_the_reference_is_nearer_to_0() -> None:
    rng = torch.Generator().manual_seed(0)
    reference = fid.Moments.of(torch.randn(40_000, 24, generator=rng))
    gaps = []
    for seed in range(5):
        rows = torch.randn(400, 24, generator=torch.Generator().manual_seed(1 + seed))
        plain = fid.frechet(fid.Moments.of(rows), reference)
        far = fid.at_infinity(rows, reference, torch.Generator().manual_seed(seed))
        gaps.append((plain, abs(far)))
    assert all(plain > 0.3 for plain, _ in gaps)
    assert sum(far for _, far in gaps) < 0.5 * sum(plain for plain, _ in gaps)


@pytest.mark.parametrize(("n", "dimension"), [(5, 12), (12, 12), (40, 12)])
def test_the_distance_of_few_rows_is_that_of_their_moments(n: int, dimension: int) -> None:
    rng = torch.Generator().manual_seed(n)
    reference = fid.Moments.of(torch.randn(300, dimension, generator=rng) * 2 + 1)
    rows = torch.randn(n, dimension, generator=rng)
    expected = fid.frechet(fid.Moments.of(rows), reference)
    assert fid._of_rows(rows, reference) == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels are the features in place of Inception's."""
    monkeypatch.setattr(feature_module, "inception_file", lambda path: path)
    monkeypatch.setattr(feature_module, "inception", lambda path, device: pixels())


@pytest.mark.usefixtures("without_weights")
def test_the_command_writes_what_evaluation_takes(tmp_path: Path) -> None:
    out = tmp_path / "digits.safetensors"
    outcome = jemkit("fid-stats", "digits", "-o", str(out), "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.record["dataset"] == "digits"
    result = statistics.read(out)
    assert result.about["shape"] == [1, 8, 8]
    assert {path.name for path in tmp_path.iterdir()} == {out.name}
    assert f"statistics {out}" in jemkit("fid-stats", "digits", "-o", str(out)).out


@pytest.mark.usefixtures("without_weights")
def test_the_command_takes_a_subset_and_says_which(tmp_path: Path) -> None:
    out = tmp_path / "digits.safetensors"
    outcome = jemkit("fid-stats", "digits", "-o", str(out), "--max-images", "100", "--json")
    assert outcome.code == 0, outcome.err
    assert "statistics of 100 images, under 2,048" in outcome.err
    about = statistics.read(out).about
    assert about["count"] == statistics.read(out).moments.n == 100
    assert about["selection"] == "100 of 1297, stratified by class, seed 0"


@pytest.mark.usefixtures("without_weights")
def test_a_folder_in_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    done = jemkit("fid-stats", "digits", "-o", str(tmp_path))
    assert "is a folder; name a file" in one_line(done, 6)


def test_statistics_without_inceptions_weights_are_refused_before_any_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics.write(tmp_path / "s.safetensors", made())
    Generation(statistics=tmp_path / "s.safetensors", features=pixels())

    def missing(_: Path | None) -> Path:
        raise DataError("FID needs Inception's weights")

    monkeypatch.setattr(evaluator_module, "inception_file", missing)
    with pytest.raises(ValidationError, match="needs Inception's weights"):
        Generation(statistics=tmp_path / "s.safetensors")
