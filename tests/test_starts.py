"""Starts draw from what they say: uniform, normal, or the moments of training images."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from toys import gen

from jemkit import Bounds, ConfigError, Images, Task
from jemkit.builtin import jemkit_starts
from jemkit.starts import (
    JITTER,
    Gaussian,
    GaussianStart,
    Labelled,
    Mixture,
    Noise,
    Uniform,
    gaussian,
    images_hash,
    moments,
    start_name,
)
from jemkit.testing import toy_task

CPU = torch.device("cpu")


def unit(task: Task) -> torch.Tensor:
    return task.bounds.from_unit(task.images("train").unit()).flatten(1)


@given(seed=seeds, n=st.integers(2, 30), d=st.integers(1, 8))
def test_moments_are_those_of_the_sample_divided_by_n(seed: int, n: int, d: int) -> None:
    x = normal(seed, n, d)
    mean, factor = gaussian(x)
    torch.testing.assert_close(mean, x.mean(0))
    covariance = torch.cov(x.T, correction=0).reshape(d, d) + JITTER * torch.eye(d)
    torch.testing.assert_close(factor @ factor.T, covariance, rtol=1e-3, atol=1e-5)
    assert torch.equal(factor, factor.tril())


@given(seed=seeds)
def test_fewer_images_than_pixels_still_give_a_factor(seed: int) -> None:
    mean, factor = gaussian(normal(seed, 3, 20))
    assert factor.isfinite().all()
    assert (factor.diagonal() > 0).all()
    alone, _ = gaussian(normal(seed, 1, 20))
    assert mean.shape == alone.shape == (20,)


def test_moments_are_taken_on_the_scale_that_the_model_sees() -> None:
    task = toy_task()
    other = replace(task, bounds=Bounds(0.0, 1.0))
    for t in (task, other):
        means, factors = moments(t, classwise=False, device=CPU)
        torch.testing.assert_close(means[0], unit(t).mean(0), rtol=1e-4, atol=1e-5)
        spread = torch.cov(unit(t).T, correction=0) + JITTER * torch.eye(64)
        torch.testing.assert_close(factors[0] @ factors[0].T, spread, rtol=1e-3, atol=1e-4)


def test_moments_of_other_images_are_other_moments_though_a_cache_is_kept() -> None:
    one, other = toy_task(seed=0), toy_task(seed=1)
    for task in (one, other, one):  # the third comes from the cache
        means, _ = moments(task, classwise=False, device=CPU)
        torch.testing.assert_close(means[0], unit(task).mean(0), rtol=1e-4, atol=1e-5)


def test_cached_moments_are_bit_for_bit_those_first_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path))
    task = toy_task()
    first = moments(task, classwise=True, device=CPU)
    (kept,) = (tmp_path / "moments").iterdir()

    def refuse(split: str) -> Images:
        raise KeyError(split)

    again = moments(replace(task, images=refuse), classwise=True, device=CPU)
    assert all(map(torch.equal, first, again))
    assert kept.suffix == ".safetensors"


def test_a_cache_that_cannot_be_written_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path / "file"))
    means, _ = moments(toy_task(), classwise=True, device=CPU)
    assert len(means) == 3


def test_each_class_has_the_mean_of_its_own_images() -> None:
    task = toy_task()
    means, _ = moments(task, classwise=True, device=CPU)
    y = task.images("train").y
    for k in range(task.n_classes):
        torch.testing.assert_close(means[k], unit(task)[y == k].mean(0), rtol=1e-4, atol=1e-5)


def test_a_class_without_an_image_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no training image of class 3, 4"):
        Mixture().build(toy_task(n_train=3, n_classes=5, seed=2), CPU)


@pytest.mark.parametrize("spec", [Gaussian(), Mixture()], ids=["gaussian", "mixture"])
def test_draws_have_the_mean_and_spread_of_the_images(spec: Gaussian) -> None:
    task = replace(toy_task(), bounds=Bounds(-9.0, 9.0))  # wide, so that clamping cuts nothing
    task = replace(task, hash=task.hash + "wide")
    means, factors = moments(toy_task(), classwise=isinstance(spec, Mixture), device=CPU)
    start = GaussianStart(means, factors, task)
    y = torch.zeros(20_000, dtype=torch.int64)
    x = start.draw(20_000, gen(), y).flatten(1)
    # the deviation of a pixel is below 1, so its mean is known to 4 / sqrt(20,000) = 0.03
    assert float((x.mean(0) - means[0]).abs().max()) < 0.03
    expected = factors[0] @ factors[0].T
    assert float((torch.cov(x.T) - expected).abs().max()) < 0.03


@pytest.mark.parametrize("name", ["uniform", "noise", "gaussian", "mixture"])
def test_a_card_names_a_start_as_it_is_registered(name: str) -> None:
    spec = jemkit_starts()[name]
    assert start_name(spec().build(toy_task(), CPU)) == name


def test_a_row_of_a_class_does_not_depend_on_the_path_that_drew_it() -> None:
    means, factors = moments(toy_task(), classwise=True, device=CPU)
    start = GaussianStart(means, factors, toy_task())
    z, y = normal(0, 70, 64), torch.arange(70) % 3
    torch.testing.assert_close(start._by_class(z, y), start._gathered(z, y))
    each = torch.stack([means[k] + factors[k] @ row for row, k in zip(z, y.tolist(), strict=True)])
    torch.testing.assert_close(start._by_class(z, y), each, rtol=1e-4, atol=1e-5)


@given(seed=seeds, n=st.integers(0, 5), size=st.sampled_from([8, 12]), k=st.sampled_from([3, 100]))
def test_every_start_draws_inside_the_range_in_the_shape_of_the_task(
    seed: int, n: int, size: int, k: int
) -> None:
    task = toy_task(n_classes=k, size=size, n_train=2 * k)
    for spec in (Uniform(), Noise(std=5.0), Gaussian()):
        x = spec.build(task, CPU).draw(n, gen(seed))
        assert x.shape == (n, 1, size, size)
        assert not len(x) or x.abs().max() <= 1


def test_uniform_fills_the_range_and_noise_surrounds_its_middle() -> None:
    task = replace(toy_task(), bounds=Bounds(0.0, 4.0))
    x = Uniform().build(task, CPU).draw(500, gen())
    assert abs(float(x.mean()) - 2) < 0.02  # 32,000 numbers of deviation 1.15
    assert float(x.min()) < 0.01
    assert float(x.max()) > 3.99
    z = Noise(std=0.1).build(task, CPU).draw(500, gen())
    assert abs(float(z.mean()) - 2) < 0.01
    assert abs(float(z.std()) - 0.1) < 0.01


def test_labels_decide_the_class_that_a_mixture_begins_in() -> None:
    task = toy_task()
    start = Mixture().build(task, CPU)
    means, _ = moments(task, classwise=True, device=CPU)
    y = torch.arange(60) % 3
    for draw in (start.draw(60, gen(), y), Labelled(start, y).draw(60, gen())):
        nearest = torch.cdist(draw.flatten(1), means).argmin(1)
        assert (nearest == y).float().mean() > 0.9


def test_the_hash_of_images_knows_their_pixels_labels_and_shape() -> None:
    x, y = torch.arange(16, dtype=torch.uint8).view(2, 1, 2, 4), torch.tensor([0, 1])
    base = images_hash(Images(x, y))
    assert base == images_hash(Images(x.clone(), y.clone()))
    others = [Images(x.flip(3), y), Images(x, y.flip(0)), Images(x.view(2, 1, 4, 2), y)]
    assert len({base, *map(images_hash, others)}) == 4
