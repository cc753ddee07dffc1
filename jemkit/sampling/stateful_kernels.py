"""Transition kernels with a state: SGLD with momentum, and Metropolis-adjusted Langevin."""

from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor

from jemkit.models.energy import EnergyFn
from jemkit.options import Options
from jemkit.sampling.kernels import gradient, noise_like, rowwise


class MomentumState(NamedTuple):
    """What SGLD with momentum carries along a chain."""

    x: Tensor  # [B, ...]
    velocity: Tensor  # [B, ...]


class SGLDMomentum(Options):
    """SGLD with momentum, after WEAT (ECCV 2024).

        v <- momentum v - step_size dE/dx
        x <- x + v + noise N(0, 1)

    x and v are [B, ...]. Under a constant gradient v tends to the step of SGLD with step_size /
    (1 - momentum): the defaults are SGLD's. `clip` bounds each element of the gradient. WEAT clamps
    the update instead, and its noise grows with the step size.
    """

    needs_stem: ClassVar[bool] = False

    step_size: float = Field(0.1, ge=0)  # factor of dE/dx
    momentum: float = Field(0.9, ge=0, lt=1)  # share of v that is kept
    noise: float = Field(0.01, ge=0)  # standard deviation, in model units
    clip: float | None = Field(None, gt=0)  # limit of each element of dE/dx; None: none

    def unused(self) -> dict[str, str]:
        idle = dict.fromkeys(("momentum", "clip"), "where step_size is 0")
        return {} if self.step_size else idle

    def init(self, x: Tensor, rng: Generator) -> MomentumState:
        return MomentumState(x, torch.zeros_like(x))

    def step(self, energy: EnergyFn, state: MomentumState, rng: Generator) -> MomentumState:
        drift = gradient(energy, state.x)
        if self.clip is not None:
            drift = drift.clamp(-self.clip, self.clip)
        velocity = self.momentum * state.velocity - self.step_size * drift
        x = state.x + velocity
        return MomentumState(x + self.noise * noise_like(x, rng) if self.noise else x, velocity)


class AdamState(NamedTuple):
    """The images of an ascent by Adam, its two moments, and the number of steps."""

    x: Tensor  # [B, ...]
    mean: Tensor
    square: Tensor
    steps: int = 0


class AdamDescent(Options):
    """Adam on pixels, as inner maximisation in Gowal et al. (2021); after `drop` steps its rate is
    a tenth."""

    needs_stem: ClassVar[bool] = False

    step_size: float = Field(0.2, ge=0)  # in model units
    drop: int = Field(5, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)

    def init(self, x: Tensor, rng: Generator) -> AdamState:
        return AdamState(x, torch.zeros_like(x), torch.zeros_like(x))

    def step(self, energy: EnergyFn, state: AdamState, rng: Generator) -> AdamState:
        slope, steps = gradient(energy, state.x), state.steps + 1
        mean = torch.lerp(slope, state.mean, self.betas[0])
        square = torch.lerp(slope.square(), state.square, self.betas[1])
        first, second = (1 - beta**steps for beta in self.betas)
        rate = self.step_size * (1.0 if steps <= self.drop else 0.1)
        move = rate * (mean / first) / ((square / second).sqrt() + 1e-9)
        return AdamState(state.x - move, mean, square, steps)


class MALAState(NamedTuple):
    """The images of a chain, and what the step that led to them reports."""

    x: Tensor  # [B, ...]
    info: dict[str, Tensor]  # acceptance: each image's probability, [B]


class MALA(Options):
    """The Metropolis-adjusted Langevin algorithm (Roberts and Tweedie 1996), of images [B, ...].

        x' = x - step_size dE/dx + sqrt(2 temperature step_size) N(0, 1)

    It samples exp(-E(x) / temperature): each image's step x' is accepted or rejected by itself.
    That is exact where rows do not depend on each other (no batch norm by the batch) and chains are
    free (`density.box = false`): a box clamps what was accepted. Both energies and gradients are
    computed in every step, since a box or a ball may have moved x since the one before.
    """

    needs_stem: ClassVar[bool] = False
    exact: ClassVar[bool] = True  # exp(-E / temperature) is stationary; `check_sampler` tests it

    step_size: float = Field(1.0, gt=0)  # factor of dE/dx
    temperature: float = Field(5e-5, gt=0)  # noise^2 / (2 step_size) of SGLD's defaults

    def init(self, x: Tensor, rng: Generator) -> MALAState:
        return MALAState(x, {})

    def step(self, energy: EnergyFn, state: MALAState, rng: Generator) -> MALAState:
        x, size, temperature = state.x, self.step_size, self.temperature
        slope = gradient(energy, x)
        noise = (2 * temperature * size) ** 0.5
        proposal = x - size * slope + noise * noise_like(x, rng)
        there = gradient(energy, proposal)
        # log q(x | x') / q(x' | x) times the temperature, without the squares that cancel
        terms = (proposal - x) * (slope + there) / 2 + size * (slope.square() - there.square()) / 4
        with torch.no_grad():
            fall = energy(x) - energy(proposal)
        log_ratio = (fall + terms.flatten(1).sum(1)) / temperature
        u = torch.rand(len(x), generator=rng, device=x.device, dtype=log_ratio.dtype)
        accepted = ~(u.log() >= log_ratio)  # NaN is accepted: a rejection would hide it
        x = torch.where(rowwise(accepted, x), proposal, x)
        return MALAState(x, {"acceptance": log_ratio.clamp(max=0).exp()})
