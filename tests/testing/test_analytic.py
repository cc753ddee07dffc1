"""Analytic energies: their gradients, moments and samples agree; exact samplers keep them."""

from typing import ClassVar

import pytest
import torch
from torch import Generator, Tensor
from toys import gen

from jemkit import MALA, EnergyFn, Options, gradient, noise_like
from jemkit.testing import (
    AnalyticEnergy,
    ConformanceError,
    DoubleWellEnergy,
    GaussianEnergy,
    MixtureEnergy,
    RingEnergy,
    check_sampler,
)

ENERGIES = [GaussianEnergy(), MixtureEnergy(), DoubleWellEnergy(), RingEnergy()]


@pytest.mark.parametrize("energy", ENERGIES)
def test_a_gradient_in_closed_form_is_autograds(energy: AnalyticEnergy) -> None:
    x = energy.sample(50, gen()).double()
    assert torch.allclose(energy.gradient(x), gradient(energy, x), atol=1e-9)


@pytest.mark.parametrize("energy", ENERGIES)
def test_samples_have_the_known_moments(energy: AnalyticEnergy) -> None:
    x = energy.sample(100_000, gen())
    assert x.shape == (100_000, 2, 1, 1)
    for what, known in energy.moments.items():
        values = energy.measured(what, x)
        assert abs(float(values.mean()) - known) < 5 * float(values.std()) / len(x) ** 0.5, what


class Unadjusted(Options):
    """Langevin steps without a rejection, which claim to be exact."""

    needs_stem: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    step_size: float = 0.02

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        noise = (2 * self.step_size) ** 0.5 * noise_like(x, rng)
        return x - self.step_size * gradient(energy, x) + noise


class Still(Unadjusted):
    """Chains that never move, which leave every density as it is."""

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        return x


def test_a_sampler_that_claims_to_be_exact_keeps_the_moments() -> None:
    assert MALA.exact
    check_sampler(MALA(step_size=0.5, temperature=0.1))


@pytest.mark.parametrize(
    ("part", "what"), [(Unadjusted(), "x1.2 is .* and not"), (Still(), "moves")]
)
def test_a_false_claim_to_be_exact_is_refused(part: Unadjusted, what: str) -> None:
    with pytest.raises(ConformanceError, match=what) as caught:
        check_sampler(part)
    assert caught.value.law == "stationary"
