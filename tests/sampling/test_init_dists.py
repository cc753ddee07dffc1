"""Starts draw from what they say: uniform, normal, or the moments of training images."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from toys import gen

from jemkit import Bounds, ConfigError, DataError, Images, Task
from jemkit.builtin import jemkit_starts
from jemkit.data import images_hash
from jemkit.runtime.files import file_hash, write_json, write_tensors
from jemkit.sampling.init_dists import (
    Gaussian,
    GaussianStart,
    Labelled,
    LowRankStart,
    Mixture,
    MomentStart,
    Noise,
    Uniform,
    _products,
    start_name,
)
from jemkit.sampling.moments import (
    JITTER,
    LARGEST,
    MOMENTS,
    RANK,
    Form,
    _directions,
    _prune,
    brought,
    expanded,
    form_of,
    gaussian,
    low_rank,
    moments_of,
)
from jemkit.testing import toy_task

CPU = torch.device("cpu")


def moments(task: Task, *, classwise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [K, D] and Cholesky factors [K, D, D]."""
    stored = moments_of(task, classwise=classwise)
    return stored["means"], expanded(stored["factors"], stored["means"].shape[1])


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
        means, factors = moments(t, classwise=False)
        torch.testing.assert_close(means[0], unit(t).mean(0), rtol=1e-4, atol=1e-5)
        spread = torch.cov(unit(t).T, correction=0) + JITTER * torch.eye(64)
        torch.testing.assert_close(factors[0] @ factors[0].T, spread, rtol=1e-3, atol=1e-4)


def test_moments_of_other_images_are_other_moments_despite_a_cache() -> None:
    one, other = toy_task(seed=0), toy_task(seed=1)
    for task in (one, other, one):  # the third comes from the cache
        means, _ = moments(task, classwise=False)
        torch.testing.assert_close(means[0], unit(task).mean(0), rtol=1e-4, atol=1e-5)


def test_cached_moments_are_bit_for_bit_those_first_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path))
    task = toy_task()
    first = moments(task, classwise=True)
    (saved,) = (tmp_path / "moments").iterdir()

    def refuse(split: str) -> Images:
        raise KeyError(split)

    again = moments(replace(task, images=refuse), classwise=True)
    assert all(map(torch.equal, first, again))
    assert saved.suffix == ".safetensors"


def test_a_cache_that_cannot_be_written_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path / "file"))
    means, _ = moments(toy_task(), classwise=True)
    assert len(means) == 3


def test_each_class_has_the_mean_of_its_own_images() -> None:
    task = toy_task()
    means, _ = moments(task, classwise=True)
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
    means, factors = moments(toy_task(), classwise=isinstance(spec, Mixture))
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
    means, factors = moments(toy_task(), classwise=True)
    start = GaussianStart(means, factors, toy_task())
    z, y = normal(0, 70, 64), torch.arange(70) % 3
    torch.testing.assert_close(start._by_class(z, y), means[y] + _products(factors, z, y))
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
    means, _ = moments(task, classwise=True)
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


def shaped(task: Task, *shape: int, k: int) -> Task:
    return replace(task, shape=shape, n_classes=k)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "k", "classwise", "rank"),
    [
        ((3, 32, 32), 10, True, None),  # CIFAR-10, JEM++: 10 triangles of 3072 are 189 MB
        ((3, 32, 32), 10, False, None),
        ((1, 28, 28), 10, True, None),
        ((3, 32, 32), 100, True, 160),  # CIFAR-100: whole ones would be 1.9 GB
        ((3, 32, 32), 20, True, RANK),
        ((3, 64, 64), 2, True, RANK),
        ((3, 64, 64), 10, False, RANK),
        ((1, 64, 64), 10, False, RANK),
        ((3, 48, 48), 1000, True, 5),
    ],
)
def test_covariances_are_whole_where_their_file_is_small(
    shape: tuple[int, int, int], k: int, classwise: bool, rank: int | None
) -> None:
    form = form_of(shaped(toy_task(), *shape, k=k), classwise=classwise)
    assert form.rank == rank
    assert form.bytes <= LARGEST


@pytest.mark.parametrize("size", [8, 33])
@pytest.mark.parametrize("classwise", [False, True])
def test_a_file_of_moments_is_as_large_as_was_forecast(size: int, classwise: bool) -> None:
    task = toy_task(size=size, n_train=24)
    result = moments_of(task, classwise=classwise)
    form = form_of(task, classwise=classwise)
    messages = (
        form.bytes if form.rank is None else form._replace(rank=result["basis"].shape[2]).bytes
    )
    assert sum(t.nbytes for t in result.values()) == messages <= form.bytes


@given(seed=seeds, n=st.integers(2, 30), d=st.integers(1, 12), rank=st.integers(1, 30))
def test_a_low_rank_is_exact_on_the_diagonal_and_wholly_where_it_is_full(
    seed: int, n: int, d: int, rank: int
) -> None:
    x = normal(seed, n, d)
    mean, basis, spread = low_rank(x, rank)
    assert basis.shape == (d, rank)
    torch.testing.assert_close(mean, x.mean(0))
    covariance = torch.cov(x.T, correction=0).reshape(d, d) + JITTER * torch.eye(d)
    made = basis @ basis.T + spread.square().diag()
    torch.testing.assert_close(made.diagonal(), covariance.diagonal(), rtol=1e-3, atol=1e-4)
    if rank >= min(n - 1, d):
        torch.testing.assert_close(made, covariance, rtol=1e-3, atol=1e-4)


def test_leading_directions_of_many_long_rows_are_those_of_an_eigendecomposition() -> None:
    d, n = 2100, 2200
    lengths = torch.tensor([30.0, 20.0, 10.0])
    axes = torch.linalg.qr(normal(0, d, 3)).Q
    c = (normal(1, n, 3) * lengths) @ axes.T / n**0.5 + 0.001 * normal(2, n, d)
    result = _directions(c, 3)
    inside = c @ axes
    wanted = axes @ (inside.T @ inside) @ axes.T
    difference = torch.linalg.matrix_norm(result @ result.T - wanted)
    assert difference < 0.01 * torch.linalg.matrix_norm(wanted)  # noise is 0.002 of the lengths


def test_low_rank_draws_have_the_mean_and_spread_of_the_images() -> None:
    task = replace(toy_task(), bounds=Bounds(-9.0, 9.0))
    x = unit(toy_task())
    means, basis, spread = low_rank(x, 3)
    start = LowRankStart(means[None], basis[None], spread[None], task)
    drawn = start.draw(20_000, gen()).flatten(1)
    assert float((drawn.mean(0) - means).abs().max()) < 0.03
    expected = basis @ basis.T + spread.square().diag()
    assert float((torch.cov(drawn.T) - expected).abs().max()) < 0.03


def test_labels_decide_the_class_of_a_low_rank_mixture_too() -> None:
    task = toy_task(size=40)
    start = Mixture().build(task, CPU)
    assert isinstance(start, MomentStart)
    y = torch.arange(60) % 3
    means = moments_of(task, classwise=True)["means"]
    nearest = torch.cdist(start.draw(60, gen(), y).flatten(1), means).argmin(1)
    assert (nearest == y).float().mean() > 0.9
    assert start_name(start) == "mixture (covariances of rank 256 at most, and a diagonal)"


@pytest.mark.parametrize("classwise", [False, True])
def test_draws_are_bit_for_bit_those_of_the_whole_factors(classwise: bool) -> None:
    task = toy_task()
    x, y = unit(task), task.images("train").y
    groups = [x[y == k] for k in range(3)] if classwise else [x]
    means, factors = (torch.stack(list(t)) for t in zip(*map(gaussian, groups), strict=True))
    for _ in range(2):  # the second time they come from the cache
        start = MomentStart(task, classwise=classwise, device=CPU)
        same = GaussianStart(means, factors, task)
        assert torch.equal(start.draw(9, gen()), same.draw(9, gen()))


def refusing(split: str) -> Images:
    raise DataError(f"the {split} images are not here")


@pytest.mark.parametrize("spec", [Gaussian(), Mixture()], ids=["gaussian", "mixture"])
def test_a_start_looks_for_its_moments_at_the_first_draw(spec: Gaussian) -> None:
    task = replace(toy_task(), images=refusing, hash="of nothing", fill=False)
    start = spec.build(task, CPU)
    assert start_name(start) in ("gaussian", "mixture")
    with pytest.raises(DataError, match=r"train images are not here.*--data-dir.*--start uniform"):
        start.draw(3, gen())


@pytest.mark.parametrize("size", [8, 40])
def test_moments_that_a_model_brings_need_no_image(tmp_path: Path, size: int) -> None:
    task = toy_task(size=size)
    start = Mixture().build(task, CPU)
    assert isinstance(start, MomentStart)
    config = tmp_path / "config.json"
    write_tensors(tmp_path / MOMENTS, start.tensors())
    write_json(config, {"sha256": {MOMENTS: file_hash(tmp_path / MOMENTS)}})
    alone = replace(task, images=refusing, hash="", fill=False, moments=brought(config))
    assert torch.equal(Mixture().build(alone, CPU).draw(5, gen()), start.draw(5, gen()))
    with pytest.raises(DataError, match="--start uniform"):
        Gaussian().build(alone, CPU).draw(5, gen())  # those are not in the file
    with pytest.raises(DataError, match=r"moments\.safetensors does not fit images"):
        Mixture().build(shaped(alone, 1, 9, 9, k=3), CPU).draw(5, gen())
    write_json(config, {"sha256": {}})
    assert brought(config) is None  # a file that nobody vouches for


def test_a_damaged_cache_is_estimated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path))
    task = toy_task()
    first = moments(task, classwise=True)
    (saved,) = (tmp_path / "moments").iterdir()
    for damage in (b"x", b""):
        saved.write_bytes(damage)
        assert all(map(torch.equal, first, moments(task, classwise=True)))
        assert saved.stat().st_size > 1000


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8, unique=False),
    limit=st.integers(0, 30),
)
def test_the_cache_keeps_what_was_used_last_up_to_its_limit(
    sizes: list[int], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    for i, size in enumerate(sizes):
        path = folder / f"{i}.safetensors"
        path.write_bytes(b"x" * size)
        os.utime(path, (1000 + i, 1000 + i))
    _prune(folder, limit)
    left = sorted(int(p.stem) for p in folder.iterdir())
    assert left == list(range(len(sizes) - len(left), len(sizes)))  # the newest, without a gap
    total = sum(sizes[i] for i in left)
    assert total <= limit or len(left) == 1
    if len(left) < len(sizes):  # nothing is removed without need
        assert total + sizes[left[0] - 1] > limit


def test_a_hit_makes_a_file_of_the_cache_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path))
    moments(toy_task(), classwise=True)
    (saved,) = (tmp_path / "moments").iterdir()
    os.utime(saved, (1000, 1000))
    moments(toy_task(), classwise=True)
    assert saved.stat().st_mtime > 1000


def test_a_form_says_what_it_is() -> None:
    assert str(Form("gaussian", 1, 64, None)) == "gaussian"
