"""HMC keeps the laws of samplers, its stationary moments too, and is a leapfrog with a test."""

import pytest
import torch
from jemkit import MALA, Bounds, Boxed, EnergyFn, noise_like, run
from jemkit.testing import CHECKS, ConformanceError, DoubleWellEnergy, GaussianEnergy
from torch import Generator, Tensor

from jemkit_hmc import HMC, HMCState


@pytest.mark.parametrize("leapfrog", [1, 5])
def test_it_keeps_the_laws_of_its_kind(leapfrog: int) -> None:
    CHECKS["sampler"](HMC(leapfrog=leapfrog))


class Untested(HMC):
    """Every proposal is accepted."""

    def step(self, energy: EnergyFn, state: HMCState, rng: Generator) -> HMCState:
        x, _ = self.trajectory(energy, state.x, noise_like(state.x, rng))
        return HMCState(x, {})


def test_the_laws_notice_a_missing_metropolis_test() -> None:
    with pytest.raises(ConformanceError, match="is exact: leaves the moments"):
        CHECKS["sampler"](Untested(leapfrog=1))


def start(n: int) -> tuple[Tensor, Generator]:
    rng = Generator().manual_seed(0)
    return torch.randn((n, 2, 1, 1), generator=rng), rng


def test_one_leapfrog_step_is_mala() -> None:
    options = {"step_size": 0.3, "temperature": 0.7}
    x, _ = start(64)
    ours, theirs = HMC(leapfrog=1, box=None, **options), MALA(**options)
    one = ours.step(DoubleWellEnergy(), ours.init(x, Generator()), Generator().manual_seed(1))
    two = theirs.step(DoubleWellEnergy(), theirs.init(x, Generator()), Generator().manual_seed(1))
    torch.testing.assert_close(one.x, two.x)
    torch.testing.assert_close(one.info["acceptance"], two.info["acceptance"], atol=1e-5, rtol=0)
    assert one.info["acceptance"].lt(1).any()


def test_a_trajectory_leads_back_where_the_momentum_is_turned() -> None:
    """The ends of the box included."""
    x, rng = start(16)
    x = x.clamp(-1.4, 1.4)
    momentum = torch.randn(x.shape, generator=rng)
    sampler = HMC(step_size=0.1, leapfrog=8, temperature=1.0, box=(-1.5, 1.5))
    there, moved = sampler.trajectory(DoubleWellEnergy(), x, momentum)
    back, turned = sampler.trajectory(DoubleWellEnergy(), there, -moved)
    assert (there - x).abs().max() > 0.5
    torch.testing.assert_close(back, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(-turned, momentum, atol=1e-4, rtol=0)


def test_the_energy_error_falls_with_the_square_of_the_step() -> None:
    x, rng = start(256)
    momentum, energy = torch.randn(x.shape, generator=rng).double(), GaussianEnergy()

    def error(leapfrog: int) -> float:
        step_size = (1.0 / leapfrog) ** 2 / 2  # trajectories of length 1
        sampler = HMC(step_size=step_size, leapfrog=leapfrog, temperature=1.0, box=None)
        there, moved = sampler.trajectory(energy, x.double(), momentum)
        kinetic = (moved.square() - momentum.square()).flatten(1).sum(1) / 2
        return float((energy(there) - energy(x.double()) + kinetic).abs().mean())

    assert error(4) / error(8) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("box", [(-1.0, 1.0), None])
def test_it_is_exact_inside_the_box(box: tuple[float, float] | None) -> None:
    """A normal density cut to [-1, 1]; without the turns at its ends, clamping is not exact."""
    rng = Generator().manual_seed(0)
    normal = torch.distributions.Normal(0.0, 1.0)
    low, high = normal.cdf(torch.tensor([-1.0, 1.0]))
    x = normal.icdf(low + (high - low) * torch.rand((4096, 4, 1, 1), generator=rng))
    known = 1 - 2 * normal.log_prob(torch.tensor(1.0)).exp() / (high - low)  # of x^2
    sampler = HMC(step_size=0.1, leapfrog=5, temperature=1.0, box=box)
    kernel = Boxed(sampler, Bounds(-1.0, 1.0))
    x = run(kernel, lambda z: z.square().flatten(1).sum(1) / 2, x, rng, steps=10)
    square = x.square().flatten(1).mean(1)
    off = (square.mean() - known).abs() / (square.std() / len(x) ** 0.5)
    assert x.abs().max() <= 1
    assert (off < 5) == (box is not None), off
