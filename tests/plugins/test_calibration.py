"""Confidence against accuracy: every image in one bin, and a temperature from validation alone."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import labels, normal, seeds
from toys import gen

from jemkit import Context, DataError, Figure, Images, Threat, testing
from jemkit.attacks.pixel_model import PixelModel
from jemkit.metrics.evaluator import measure
from jemkit.testing import toy_model, toy_task
from jemkit_plugins.calibration import (
    COLDEST,
    HOTTEST,
    Calibration,
    binned,
    brier,
    nll,
    reliability,
    temperature,
)

TASK = toy_task(n_train=40)


def context(**settings: Any) -> Context:
    return Context(gen(), Threat("Linf", 25.5), batch_size=7, card={"split": "test"}, **settings)


def figures(data: Images, ctx: Context, **options: Any) -> dict[str, Figure]:
    subject = PixelModel(toy_model(TASK), TASK.bounds)
    measured = measure(subject, data, [Calibration(**options)], ctx)
    return {figure.name: figure for figure in measured}


@given(seed=seeds, n=st.integers(1, 300), bins=st.integers(1, 40))
def test_every_image_is_in_one_bin(seed: int, n: int, bins: int) -> None:
    rng = gen(seed)
    confidence = torch.rand(n, generator=rng, dtype=torch.float64)
    right = torch.rand(n, generator=rng) < 0.5
    assert sum(binned(confidence, right, bins).images) == n


@given(bins=st.integers(1, 60))
def test_a_confidence_on_an_edge_counts_once_and_a_whole_one_in_the_last_bin(bins: int) -> None:
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    table = binned(edges, torch.ones(bins + 1, dtype=torch.bool), bins)
    assert len(table.images) == bins
    assert table.images == [2, *[1] * (bins - 1)]  # 0 shares the first bin with its upper edge
    assert binned(torch.ones(3), torch.ones(3), bins).images[-1] == 3


@given(bins=st.integers(1, 20), right=st.lists(st.integers(0, 10), min_size=1, max_size=8))
def test_a_calibrated_model_has_no_calibration_error(bins: int, right: list[int]) -> None:
    """Of every ten images with a confidence of k / 10, k are right."""
    confidence = torch.tensor([k / 10 for k in right for _ in range(10)], dtype=torch.float64)
    hits = torch.tensor([i < k for k in right for i in range(10)])
    assert binned(confidence, hits, bins).ece == pytest.approx(0, abs=1e-12)


def test_the_calibration_error_of_four_images_is_as_worked_by_hand() -> None:
    confidence = torch.tensor([0.55, 0.65, 0.9, 1.0], dtype=torch.float64)
    table = binned(confidence, torch.tensor([True, False, True, True]), 2)
    assert table.images == [0, 4]
    assert table.confidence == [None, pytest.approx(0.775)]
    assert table.accuracy == [None, 0.75]
    assert table.ece == pytest.approx(0.025)
    table = binned(confidence, torch.tensor([True, False, True, True]), 10)
    assert table.ece == pytest.approx((0.45 + 0.65 + 0.1 + 0.0) / 4)


def test_likelihood_and_brier_score_of_a_coin_are_as_worked_by_hand() -> None:
    logits, y = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]]), torch.tensor([0, 1])
    assert nll(logits, y) == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert brier(logits, y) == pytest.approx((0.5 + 2 * 0.75**2) / 2)


@given(seed=seeds, scale=st.floats(0.2, 5))
def test_the_temperature_of_scaled_logits_is_scaled_too(seed: int, scale: float) -> None:
    logits = normal(seed, 200, 4, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(1), 1, generator=gen(seed)).squeeze(1)
    value = temperature(logits, y)
    assert 0.4 < value < 2.5
    assert temperature(scale * logits, y) == pytest.approx(scale * value, rel=1e-9)


@given(seed=seeds, t=st.floats(0.3, 3))
def test_no_other_temperature_makes_validation_likelier(seed: int, t: float) -> None:
    logits, y = normal(seed, 60, 3, scale=2.0), labels(seed, 60, 3)
    assert nll(logits.double() / temperature(logits, y), y) <= nll(logits.double() / t, y) + 1e-9


def test_a_temperature_without_an_optimum_is_an_end_of_its_range_or_one() -> None:
    z = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert temperature(z, torch.tensor([0, 1])) == COLDEST
    assert temperature(z, torch.tensor([1, 0])) == HOTTEST
    assert temperature(torch.zeros(2, 2), torch.tensor([1, 0])) == 1
    assert math.isnan(temperature(torch.tensor([[math.nan, 0.0]]), torch.tensor([0])))


def test_the_figures_are_those_of_the_models_own_probabilities() -> None:
    ctx, data = context(images=TASK.images), TASK.images("valid")
    measured = figures(data, ctx)
    model = toy_model(TASK).eval()
    with torch.no_grad():
        logits = model(TASK.bounds.from_unit(data.unit())).logits
    assert measured["ece"].value == pytest.approx(reliability(logits, data.y, 20).ece)
    assert measured["nll"].value == pytest.approx(float(F.cross_entropy(logits, data.y)), rel=1e-5)
    assert measured["temperature"].value == pytest.approx(temperature(logits, data.y), rel=1e-3)
    assert (
        measured["nll_scaled"].value <= measured["nll"].value + 1e-9
    )  # fitted on these very images
    assert sum(ctx.notes.tables["reliability"]["count"]) == len(data.y)


def test_the_temperature_looks_at_validation_images_alone() -> None:
    requested = []

    def images(split: str) -> Images:
        requested.append(split)
        return TASK.images("valid")

    data = TASK.images("train")
    other = Images(255 - data.x, data.y.flip(0))
    one, two = (figures(part, context(images=images)) for part in (data, other))
    assert one["temperature"].value == two["temperature"].value
    assert one["nll"].value != two["nll"].value
    assert requested == ["valid", "valid"]
    assert one["temperature"].n == len(TASK.images("valid").y)


def test_without_validation_images_the_rest_is_measured_with_a_warning() -> None:
    def missing(split: str) -> Images:
        raise DataError(f"{split} is not there")

    for ctx in (context(), replace(context(), images=missing)):
        assert set(figures(TASK.images("valid"), ctx)) == {"ece", "nll", "brier"}
        assert "no temperature" in ctx.notes.warnings[0]


def test_calibration_keeps_the_laws_of_an_evaluator() -> None:
    testing.check_evaluator(Calibration())


def test_a_temperature_fitted_on_possible_training_images_is_not_standard() -> None:
    for held_out in (True, False):
        ctx = context(images=TASK.images, held_out=held_out)
        measured = figures(TASK.images("train"), ctx).values()
        fitted = {f.name: f.protocol.get("standard", True) for f in measured}
        assert fitted["ece"] is fitted["nll"] is True
        assert fitted["temperature"] is fitted["ece_scaled"] is fitted["nll_scaled"] is held_out
