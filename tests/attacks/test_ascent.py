"""Ascents: a step by default is a quarter of the radius in the norm of its ball."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import gen

from jemkit import Bounds, L2Ascent, SGLDAscent, SignAscent
from jemkit.sampling.kernels import Sampler, run

BOUNDS = Bounds()
SHAPE = (2, 1, 8, 8)


def moved(kernel: Sampler) -> torch.Tensor:
    """A step from 0 down an energy whose slope differs from pixel to pixel; in 1/255."""
    slope = torch.linspace(0.5, 1, 64).view(SHAPE[1:])
    end = run(kernel, lambda z: (z * slope).flatten(1).sum(1), torch.zeros(SHAPE), gen(), 1)
    return end.flatten(1) / 2 * 255


@given(radius=st.floats(10, 500), ascent=st.sampled_from([SignAscent(), L2Ascent()]))
def test_a_step_by_default_is_a_quarter_of_the_radius_in_l2(radius: float, ascent: Any) -> None:
    sizes = moved(ascent.kernel(torch.zeros(SHAPE), radius, BOUNDS, "L2")).norm(dim=1)
    torch.testing.assert_close(sizes, torch.full((2,), radius / 4), rtol=1e-4, atol=1e-4)


@given(radius=st.floats(1, 255))
def test_a_sign_step_by_default_is_a_quarter_of_the_radius_in_linf(radius: float) -> None:
    sizes = moved(SignAscent().kernel(torch.zeros(SHAPE), radius, BOUNDS, "Linf")).abs()
    torch.testing.assert_close(sizes, torch.full((2, 64), radius / 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_size_that_is_given_holds_in_pixels_whatever_the_radius(norm: Any) -> None:
    x = torch.zeros(SHAPE)
    sign = moved(SignAscent(step_px=3).kernel(x, 100, BOUNDS, norm))
    torch.testing.assert_close(sign.abs(), torch.full((2, 64), 3.0), rtol=1e-4, atol=1e-4)
    l2 = moved(L2Ascent(step_px=3).kernel(x, 100, BOUNDS, norm)).norm(dim=1)
    torch.testing.assert_close(l2, torch.full((2,), 3.0), rtol=1e-4, atol=1e-4)


def test_sgld_goes_by_the_gradient_itself_without_noise() -> None:
    kernel = SGLDAscent(step_size=0.1).kernel(torch.zeros(SHAPE), 8, BOUNDS, "Linf")
    expected = -0.1 * torch.linspace(0.5, 1, 64).expand(2, 64) / 2 * 255
    torch.testing.assert_close(moved(kernel), expected)
