"""Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011), a sampler that is exact."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from jemkit import EnergyFn, Options, Sampler, gradient, hookimpl, noise_like
from pydantic import Field
from torch import Generator, Tensor


class HMCState(NamedTuple):
    """The images of a chain, and what the step that led to them reports."""

    x: Tensor  # [B, ...]
    info: dict[str, Tensor]  # acceptance: each image's probability, [B]


class HMC(Options):
    """`leapfrog` steps with a fresh momentum p, and a Metropolis test for each image [B, ...].

        p <- p - h / (2 T) dE/dx;  x <- x + h p;  p <- p - h / (2 T) dE/dx,  h^2 = 2 T step_size

    It samples exp(-E(x) / T), T the temperature. With one leapfrog step it is `mala`. Pixels are
    free along a trajectory: a box clamps its end only, after the test, so the sampler is exact if
    `density.box = false` and rows do not depend on each other (no batch norm by the batch).
    A step has leapfrog + 1 gradients and two energies, since a box may have moved x before it.
    """

    needs_stem: ClassVar[bool] = False
    exact: ClassVar[bool] = True  # exp(-E / temperature) is stationary; the laws test it

    step_size: float = Field(1.0, gt=0)  # factor of dE/dx in a leapfrog step, in model units
    leapfrog: int = Field(5, ge=1)  # steps before each test
    temperature: float = Field(5e-5, gt=0)  # as of mala and of SGLD's defaults

    def init(self, x: Tensor, rng: Generator) -> HMCState:
        return HMCState(x, {})

    def step(self, energy: EnergyFn, state: HMCState, rng: Generator) -> HMCState:
        momentum = noise_like(state.x, rng)
        x, moved = self.trajectory(energy, state.x, momentum)
        with torch.no_grad():
            fall = (energy(state.x) - energy(x)) / self.temperature
        log_ratio = fall + (momentum.square() - moved.square()).flatten(1).sum(1) / 2
        u = torch.rand(len(x), generator=rng, device=x.device, dtype=log_ratio.dtype)
        accepted = ~(u.log() >= log_ratio)  # NaN is accepted: a rejection would hide it
        x = torch.where(accepted.view(-1, *[1] * (x.ndim - 1)), x, state.x)
        return HMCState(x, {"acceptance": log_ratio.clamp(max=0).exp()})

    def trajectory(self, energy: EnergyFn, x: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """Where x and its momentum, both [B, ...], are after all leapfrog steps."""
        length = (2 * self.temperature * self.step_size) ** 0.5
        half = length / (2 * self.temperature)  # of a step of the momentum
        momentum = momentum - half * gradient(energy, x)
        for last in [False] * (self.leapfrog - 1) + [True]:
            x = x + length * momentum
            momentum = momentum - (half if last else 2 * half) * gradient(energy, x)
        return x, momentum


@hookimpl
def jemkit_samplers() -> Mapping[str, type[Sampler]]:
    return {"hmc": HMC}
