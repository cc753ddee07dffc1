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

    It samples exp(-E(x) / T) inside the box, T the temperature: a pixel that reaches an end of its
    range turns round, as does its p, so that the density has nothing to clamp. That is exact where
    rows do not depend on each other (no batch norm by the batch). One leapfrog step without a box
    is `mala`. A step has leapfrog + 1 gradients and two energies.
    """

    needs_stem: ClassVar[bool] = False
    exact: ClassVar[bool] = True  # exp(-E / temperature) is stationary; the laws test it

    step_size: float = Field(0.03, gt=0)  # factor of dE/dx in a leapfrog step, in model units
    leapfrog: int = Field(5, ge=1)  # steps before each test
    temperature: float = Field(5e-5, gt=0)  # as of mala and of SGLD's defaults
    box: tuple[float, float] | None = (-1.0, 1.0)  # the model's range of pixels; None: no ends

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
            x, momentum = self.reflected(x + length * momentum, momentum)
            momentum = momentum - (half if last else 2 * half) * gradient(energy, x)
        return x, momentum

    def reflected(self, x: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """Both [B, ...], after every turn at an end of the box."""
        if self.box is None:
            return x, momentum
        low, width = self.box[0], self.box[1] - self.box[0]
        beyond = (x - low) % (2 * width)  # there and back
        back = beyond > width
        x = low + torch.where(back, 2 * width - beyond, beyond)
        return x, torch.where(back, -momentum, momentum)


@hookimpl
def jemkit_samplers() -> Mapping[str, type[Sampler]]:
    return {"hmc": HMC}
