"""Markov chains over an energy function: transition kernels, and the loop around them (Eq. 10)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Generator, Tensor

from jemkit.data import Bounds
from jemkit.errors import MisfitError
from jemkit.models.energy import EnergyFn, ModelEnergy
from jemkit.options import Options

Ball = Literal["Linf", "L2"]


@runtime_checkable
class Sampler(Protocol):
    """A transition kernel: pure in `x` and in what `rng` draws."""

    @property
    def needs_stem(self) -> bool:
        """Whether the energy must offer `stem` and `trunk`."""
        ...

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        """One transition of every row of x, [B, ...]."""
        ...


Gradient = Callable[[EnergyFn, Tensor], Tensor]
"""An energy and x [B, ...] to dE/dx, row by row."""


def eager_gradient(energy: EnergyFn, x: Tensor) -> Tensor:
    return slope_at(energy, x.detach().requires_grad_())


def slope_at(energy: EnergyFn, leaf: Tensor) -> Tensor:
    """dE/dx at a leaf that asks for it."""
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf)
    return grad


_GRADIENT: ContextVar[Gradient] = ContextVar("gradient", default=eager_gradient)


def gradient(energy: EnergyFn, x: Tensor) -> Tensor:
    """The gradient of E at each row of x; leaves every parameter's `.grad` alone."""
    return _GRADIENT.get()(energy, x)


@contextmanager
def gradients_by(unit: Gradient) -> Iterator[None]:
    """Let `unit` compute every gradient of a chain inside the block, such as a compiled one."""
    token = _GRADIENT.set(unit)
    try:
        yield
    finally:
        _GRADIENT.reset(token)


def chain(
    sampler: Sampler, energy: EnergyFn, x: Tensor, rng: Generator, steps: int
) -> Iterator[Tensor]:
    """x_1, ..., x_steps, each detached."""
    for _ in range(steps):
        x = sampler.step(energy, x, rng).detach()
        yield x


def last(states: Iterator[Tensor], x: Tensor) -> Tensor:
    """The end of a chain that began at x."""
    for state in states:
        x = state
    return x.detach()


def run(sampler: Sampler, energy: EnergyFn, x: Tensor, rng: Generator, steps: int) -> Tensor:
    """The last state of a chain; no steps give x back."""
    return last(chain(sampler, energy, x, rng, steps), x)


def noise_like(x: Tensor, rng: Generator) -> Tensor:
    return torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)


class SGLD(Options):
    """Stochastic gradient Langevin dynamics (Eq. 10), step and noise set apart as JEM does.

    Both are in model units, [-1, 1]. `clip` bounds each element of the gradient before the step.
    """

    needs_stem: ClassVar[bool] = False

    step_size: float = Field(1.0, ge=0)
    noise: float = Field(0.01, ge=0)
    clip: float | None = Field(None, gt=0)

    @classmethod
    def langevin(cls, c: float) -> "SGLD":
        """Eq. 10 as printed: the step is c^2 / 2 and the noise c."""
        return cls(step_size=c**2 / 2, noise=c)

    def unused(self) -> dict[str, str]:
        return {} if self.step_size else {"clip": "where step_size is 0"}

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        drift = gradient(energy, x)
        if self.clip is not None:
            drift = drift.clamp(-self.clip, self.clip)
        x = x - self.step_size * drift
        return x + self.noise * noise_like(x, rng) if self.noise else x


class PYLD(Options):
    """Proximal YOPO-Langevin dynamics (JEM++, Yang and Ji 2021).

    One gradient of the trunk, then `inner_steps` that backpropagate through the stem alone. Where
    the stem is linear this is noise-free SGLD with a step of inner_steps * step_size.
    """

    needs_stem: ClassVar[bool] = True

    inner_steps: int = Field(5, ge=1)
    step_size: float = Field(0.2, ge=0)
    clip: float | None = Field(1.0, gt=0)

    def unused(self) -> dict[str, str]:
        idle = dict.fromkeys(("inner_steps", "clip"), "where step_size is 0")
        return {} if self.step_size else idle

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        if not isinstance(energy, ModelEnergy):
            raise MisfitError("PYLD holds the first layer's slope fixed: give it a ModelEnergy")
        with torch.no_grad():
            h = energy.stem(x)
        slope = gradient(energy.trunk, h)  # dE/dh at the stem's output
        for _ in range(self.inner_steps):
            drift = gradient(lambda x: (slope * energy.stem(x)).flatten(1).sum(1), x)
            if self.clip is not None:
                drift = drift.clamp(-self.clip, self.clip)
            x = x - self.step_size * drift
        return x


class SignDescent(Options):
    """Steepest descent in the L-infinity norm: PGD's step without the projection."""

    needs_stem: ClassVar[bool] = False

    step_size: float = Field(0.01, ge=0)

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        return x - self.step_size * gradient(energy, x).sign()


class L2Descent(Options):
    """Steepest descent in the L2 norm; a row whose gradient is 0 stays where it is."""

    needs_stem: ClassVar[bool] = False

    step_size: float = Field(0.1, ge=0)

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        slope = gradient(energy, x)
        norm = _rows(slope.flatten(1).norm(dim=1), slope)
        return x - self.step_size * torch.where(norm > 0, slope / norm, 0 * slope)


@dataclass(frozen=True)
class Boxed:
    """`inner`, then back into the pixel range."""

    inner: Sampler
    bounds: Bounds

    @property
    def needs_stem(self) -> bool:
        return self.inner.needs_stem

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        return self.bounds.clamp(self.inner.step(energy, x, rng))


@dataclass(frozen=True)
class Projected:
    """`inner`, then back into the ball of `radius` around `centre` and into the pixel range."""

    inner: Sampler
    centre: Tensor
    radius: float  # in tensor units: Bounds.px turns pixels into them
    bounds: Bounds
    norm: Ball = "Linf"

    @property
    def needs_stem(self) -> bool:
        return self.inner.needs_stem

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        return self.project(self.inner.step(energy, x, rng))

    def project(self, x: Tensor) -> Tensor:
        delta = x - self.centre
        if self.norm == "Linf":
            delta = delta.clamp(-self.radius, self.radius)
        else:
            norm = _rows(delta.flatten(1).norm(dim=1), delta)
            delta = torch.where(norm > self.radius, delta * (self.radius / norm), delta)
        return self.bounds.clamp(self.centre + delta)


def _rows(value: Tensor, like: Tensor) -> Tensor:
    """One value a row, [B], shaped to multiply `like`."""
    return value.view(-1, *[1] * (like.ndim - 1))
