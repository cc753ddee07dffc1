"""How samples are judged: drawn so that a kill costs little, measured under an honest name."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_tools import (
    PIXELS,
    TASK,
    context,
    images,
    judged,
    mean_pixels,
    subject,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from strategies import labels, seeds, uniform
from torch import Tensor
from toys import REGISTRY

from jemkit import PixelModel
from jemkit.errors import DataError, MisfitError, Preempted
from jemkit.metrics.evaluator import Context, Unmeasurable, measure
from jemkit.metrics.figures import Figure
from jemkit.runtime.work_cache import Shard
from jemkit.sampling.density import Density
from jemkit.sampling.init_dists import UniformStart
from jemkit.testing import toy_model, toy_task
from jemkit_plugins.generation import Generation
from jemkit_plugins.generation.features import (
    Extracted,
    Features,
)
from jemkit_plugins.generation.fid import Moments, frechet
from jemkit_plugins.generation.samples import GeneratedImages, fresh


def test_a_figure_is_the_distance_of_the_samples_that_chains_give(tmp_path: Path) -> None:
    model, ctx = subject(), context(work=tmp_path)
    figures = judged(ctx, model)
    start = model.density.start
    drawn = fresh(model, ctx, 40, {}, steps=1, start=start)
    train = torch.cat([images("train").unit(), images("valid").unit()])
    a, b = (Moments.of(mean_pixels(x)) for x in (drawn.x.float() / 255, train))
    assert figures["fd-pixels"].value == pytest.approx(frechet(a, b), abs=1e-6)


def test_every_figure_tells_how_it_came_about() -> None:
    figures = judged(context(seed=7), max_reference=50)
    assert list(figures) == ["fd-pixels", "kd-pixels", "precision-pixels", "recall-pixels"]
    for figure in figures.values():
        card = figure.protocol
        assert figure.n == card["n"] == card["images"] == 40
        assert (card["source"], card["steps"], card["start"]) == ("chains", 1, "uniform")
        assert card["sampler"].startswith("SGLD(")
        assert card["selection"] == "none"
        assert (card["reference"]["set"], card["reference"]["count"]) == ("train", 50)
        assert "rounded" in card["quantisation"]
        assert card["features"]["name"] == "pixels"
        assert len(card["features"]["sha256"]) == 64
        assert card["seed"] == 7
        assert not card["standard"]  # part of the reference only
        json.dumps(card)
    assert figures["kd-pixels"].protocol["std"] >= 0
    assert figures["kd-pixels"].protocol["subset_size"] == 40


@pytest.mark.parametrize(("n", "quick", "drawn"), [(40, False, 40), (300, True, 256)])
def test_a_quick_look_takes_few_samples(n: int, quick: bool, drawn: int) -> None:
    figures = judged(context(quick=quick), n=n, steps=0)
    assert {figure.n for figure in figures.values()} == {drawn}


@pytest.mark.parametrize(("n", "few"), [(2047, True), (2048, False)])
def test_under_2048_samples_a_warning_stands_beside_the_figures(n: int, few: bool) -> None:
    ctx = context(batch_size=2048)
    figures = judged(ctx, n=n, steps=0)
    assert any("2,048" in warning for warning in ctx.notes.warnings) is few
    assert figures["fd-pixels"].protocol["few"] is few


@pytest.mark.parametrize(("reference", "count"), [("train", 80), ("train+test", 120)])
def test_the_reference_is_counted_whole(reference: str, count: int) -> None:
    """40 images to train on and 40 to validate make the data set's training images."""
    figures = judged(reference=reference)
    assert figures["fd-pixels"].protocol["reference"]["count"] == count


@pytest.mark.parametrize(
    ("options", "standard"),
    [({}, True), ({"n": 20}, True), ({"steps": 39}, False), ({"reference": "train+test"}, False)],
)
def test_only_the_default_options_are_the_standard_protocol(
    options: dict[str, Any], standard: bool
) -> None:
    figures = judged(**{"steps": 40, **options})
    assert {figure.protocol["standard"] for figure in figures.values()} == {standard}


def test_images_of_the_reference_itself_have_no_distance() -> None:
    """A buffer that holds the training images and nothing else."""
    model = subject()
    whole = torch.cat([images("train").unit(), images("valid").unit()])
    figures = judged(model=with_buffer(model, whole), source="buffer", n=len(whole))
    assert abs(figures["fd-pixels"].value) < 1e-3
    assert figures["precision-pixels"].value == figures["recall-pixels"].value == 1
    assert figures["fd-pixels"].protocol["source"] == "buffer"
    assert figures["fd-pixels"].protocol["steps"] is None
    assert not figures["fd-pixels"].protocol["standard"]


def with_buffer(model: PixelModel, pixels: Tensor) -> PixelModel:
    buffer = model.density.buffer  # type: ignore[attr-defined]
    buffer.states, buffer.chains_begun = TASK.bounds.from_unit(pixels), len(pixels)
    return model


def test_a_buffer_of_fewer_states_than_requested_is_taken_whole() -> None:
    figures = judged(model=with_buffer(subject(), uniform(0, 25, 1, 8, 8, low=0)), source="buffer")
    assert figures["fd-pixels"].n == 25


def test_a_buffer_that_no_training_filled_is_no_sample() -> None:
    with pytest.raises(Unmeasurable, match="trained replay buffer"):
        judged(source="buffer")


def test_chains_begin_at_the_named_start() -> None:
    own_start = judged(steps=0)["fd-pixels"]
    named = Generation.model_validate(
        {"start": "gaussian", "n": 40, "steps": 0, "features": PIXELS}, context=REGISTRY.context
    )
    ctx = context()
    gaussian = {f.name: f for f in measure(subject(), images("test"), [named], ctx)}["fd-pixels"]
    assert gaussian.protocol["start"] == "Gaussian()"
    assert gaussian.value < own_start.value  # nearer to the data than uniform noise


def test_an_unknown_start_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'uniform'"):
        Generation.model_validate({"start": "unifrom"}, context=REGISTRY.context)


@pytest.mark.parametrize("option", [{"n": 3}, {"steps": -1}, {"selection": "top10"}, {"x": 1}])
def test_options_that_cannot_be_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        Generation(**option)


# the JEM family's habit


@given(seed=seeds, n=st.integers(1, 60), n_classes=st.integers(1, 7))
def test_the_most_confident_nine_tenths_of_each_class_stay_in_their_order(
    seed: int, n: int, n_classes: int
) -> None:
    y, confidence = labels(seed, n, n_classes), uniform(seed + 1, n, low=0)
    stored = GeneratedImages(torch.arange(n), y, confidence).most_confident(0.9)
    assert torch.equal(stored.x, stored.x.sort().values)
    for label in y.unique():
        inside = y == label
        left = stored.y == label
        assert int(left.sum()) == math.ceil(0.9 * int(inside.sum()))
        dropped = sorted(confidence[inside].tolist())[: int(inside.sum()) - int(left.sum())]
        assert not dropped or max(dropped) <= float(stored.confidence[left].min())


def test_a_selection_stands_in_the_figures_names_and_counts() -> None:
    ctx = context()
    figures = judged(ctx, selection="top90")
    assert set(figures) == {f"{m}-pixels-top90" for m in ("fd", "kd", "precision", "recall")}
    for figure in figures.values():
        assert 36 <= figure.n < 40
        assert figure.protocol["n"] == figure.n
        assert figure.protocol["selection"] == "top90"
        assert not figure.protocol["standard"]
    assert set(ctx.notes.pictures) == {"samples-top90", "neighbours-top90"}


def test_a_classifier_has_no_samples() -> None:
    with pytest.raises(Unmeasurable, match="without a density"):
        judged(model=PixelModel(toy_model(TASK), TASK.bounds))


def test_without_training_images_there_is_no_reference() -> None:
    with pytest.raises(Unmeasurable, match="no train images"):
        judged(context(images=None))


def test_samples_of_another_shape_than_the_reference_are_refused() -> None:
    other = toy_task(channels=3)
    with pytest.raises(MisfitError, match=r"\[1, 8, 8\].*\[3, 8, 8\]"):
        judged(context(images=lambda split: other.images("valid")))


class Broken:
    """A density whose chains leave every range."""

    def __init__(self, inner: Density) -> None:
        self.sampler, self.start, self.steps = inner.sampler, inner.start, inner.steps

    def sample(self, model: Any, n: int, rng: Any, **_: Any) -> Tensor:
        return torch.full((n, 1, 8, 8), float("nan"))


def test_samples_that_are_not_finite_are_no_black_images() -> None:
    model = subject()
    broken = PixelModel(model.model, TASK.bounds, Broken(model.density))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="diverge"):
        judged(model=broken)


def test_features_that_are_not_finite_are_refused_by_name() -> None:
    bad = Features("bad", lambda x: Extracted(torch.full((len(x), 3), float("inf"))), {})
    with pytest.raises(DataError, match="'bad'"):
        judged(features=bad)


# half-done work


def drawn_in(
    work: Path | None, n: int = 1100, model: PixelModel | None = None, **settings: Any
) -> tuple[list[Figure], Context]:
    ctx = context(work=work, batch_size=500, **settings)
    evaluator = Generation(n=n, steps=1, features=PIXELS)
    return measure(model or subject(), images("test"), [evaluator], ctx), ctx


def test_interrupted_sampling_ends_in_the_same_figures_bit_for_bit(tmp_path: Path) -> None:
    whole, one = drawn_in(None)
    polls = iter(range(100))
    with pytest.raises(Preempted):
        drawn_in(tmp_path, stop=lambda: next(polls) >= 3)
    pieces = list(tmp_path.rglob("0*.safetensors"))
    assert 0 < len(pieces) < 3
    before = {piece: piece.stat().st_mtime_ns for piece in pieces}
    resumed, two = drawn_in(tmp_path)
    assert {piece: piece.stat().st_mtime_ns for piece in pieces} == before
    assert resumed == whole
    assert two.notes.pictures == one.notes.pictures
    assert two.notes.tables == one.notes.tables


def test_processes_that_share_the_work_find_what_one_finds(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    whole, _ = drawn_in(None)
    with ThreadPoolExecutor(2) as pool:
        models = [subject() for _ in range(2)]  # first weights are drawn from a global generator
        parts = [
            pool.submit(drawn_in, tmp_path, model=model, shard=Shard(rank, 2))
            for rank, model in enumerate(models)
        ]
        assert [part.result()[0] for part in parts] == [whole, whole]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"steps": 2}, {"source": "buffer"}, {"model": 1}],
    ids=lambda change: next(iter(change)),
)
def test_samples_of_anything_else_are_drawn_again(tmp_path: Path, change: dict[str, Any]) -> None:
    judged(context(work=tmp_path))
    before = {path.name for path in tmp_path.iterdir()}
    model = with_buffer(subject(change.pop("model", 0)), uniform(0, 40, 1, 8, 8, low=0))
    judged(context(work=tmp_path, seed=change.pop("seed", 0)), model, **change)
    assert len({path.name for path in tmp_path.iterdir()} - before) >= 2  # samples and features


@given(seed=st.integers(0, 100))
@settings(max_examples=5)
def test_the_same_seed_gives_the_same_samples_and_another_others(seed: int) -> None:
    model = subject()
    start = UniformStart(TASK.shape, TASK.bounds)

    def drawn(seed: int) -> Tensor:
        return fresh(model, context(seed=seed), 20, {}, steps=1, start=start).x

    assert torch.equal(drawn(seed), drawn(seed))
    assert not torch.equal(drawn(seed), drawn(seed + 1))


def test_judging_moves_no_global_generator_and_no_buffer() -> None:
    model = subject()
    before, states = torch.get_rng_state(), model.density.buffer.states.clone()  # type: ignore[attr-defined]
    judged(model=model)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.density.buffer.states, states)  # type: ignore[attr-defined]


# pictures and neighbours


def test_copies_of_training_images_have_no_distance_to_their_neighbours() -> None:
    train, ctx = images("train").unit(), context()
    judged(ctx, with_buffer(subject(), train), source="buffer")
    table = ctx.notes.tables["neighbours"]
    assert table["mean_distance"] == 0
    assert table["distances"] == [0.0] * 20


def test_the_neighbours_picture_has_each_sample_over_its_nearest_training_images() -> None:
    train, ctx = images("train").unit(), context()
    judged(ctx, with_buffer(subject(), train), source="buffer")
    picture = np.asarray(Image.open(io.BytesIO(ctx.notes.pictures["neighbours"])))
    small = picture[::8, ::8]  # each pixel of an 8 px image is 8 wide
    assert small.shape == (6 * 9 + 2 + 2, 20 * 9 + 1)  # six rows, a line, and the frames' ends
    for i in range(20):
        sample = small[1:9, 9 * i + 1 : 9 * i + 9]
        nearest = small[9 + 1 + 2 + 1 :][:8, 9 * i + 1 : 9 * i + 9]
        assert np.array_equal(sample, nearest)
    assert (small[10:12] == 255).all()
    shown = np.asarray(Image.open(io.BytesIO(ctx.notes.pictures["samples"])))[::8, ::8]
    assert shown.shape == (4 * 9 + 1, 10 * 9 + 1)
    assert np.array_equal(shown[1:9, 1:9], small[1:9, 1:9])
