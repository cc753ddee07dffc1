"""Distances are 0 at the image itself, never below, and judge each image alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds, uniform
from toys import linear_model

from jemkit import Bounds, gradient
from jemkit.models.distances import L2, LogitDistance, NoDistance
from jemkit.testing import toy_model, toy_task

TASK = toy_task()
DISTANCES = [NoDistance(), L2(), LogitDistance()]
distances = st.sampled_from(DISTANCES)


@given(distance=distances, seed=seeds)
def test_a_distance_is_symmetric_and_zero_at_the_image(distance: L2, seed: int) -> None:
    model = toy_model(TASK).eval()
    x, z = uniform(seed, 3, *TASK.shape), uniform(seed + 1, 3, *TASK.shape)
    there = distance.bind(model, x, Bounds())
    back = distance.bind(model, z, Bounds())
    assert (there(x).abs() <= 1e-6).all()
    assert (there(z) >= 0).all()
    torch.testing.assert_close(there(z), back(x), rtol=1e-4, atol=1e-6)


@given(seed=seeds)
def test_no_distance_is_zero_everywhere_and_pulls_nowhere(seed: int) -> None:
    x, z = uniform(seed, 3, *TASK.shape), uniform(seed + 1, 3, *TASK.shape)
    assert torch.equal(NoDistance().bind(toy_model(TASK), x, Bounds())(z), torch.zeros(3))


@given(seed=seeds)
def test_l2_is_half_the_mean_square_of_the_differences(seed: int) -> None:
    x, z = uniform(seed, 3, *TASK.shape), uniform(seed + 1, 3, *TASK.shape)
    d = L2().bind(toy_model(TASK), x, Bounds())
    torch.testing.assert_close(d(z), ((x - z) ** 2).mean(dim=(1, 2, 3)) / 2)
    torch.testing.assert_close(gradient(d, z), (z - x) / 64)


@given(seed=seeds)
def test_the_logit_distance_is_the_squared_chord_between_directions(seed: int) -> None:
    model = linear_model(12, 5, seed)
    x, z = normal(seed, 3, 12), normal(seed + 1, 3, 12)
    d = LogitDistance().bind(model, x, Bounds())(z)
    cosine = torch.cosine_similarity(model(x).logits, model(z).logits)
    torch.testing.assert_close(d, 2 - 2 * cosine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda d: type(d).__name__)
def test_the_clean_images_are_looked_at_once_and_never_learnt_from(distance: L2) -> None:
    model, x = toy_model(TASK).eval(), uniform(0, 3, *TASK.shape)
    recorded: list[int] = []
    model.network.register_forward_hook(lambda m, args, out: recorded.append(len(args[0])))
    far = distance.bind(model, x, Bounds())
    bound = len(recorded)
    for seed in range(3):
        far(uniform(seed, 3, *TASK.shape))
    assert bound <= 1
    assert len(recorded) - bound in (0, 3)
