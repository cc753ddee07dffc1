"""Markov chains over an energy function: transition kernels, and the loop around them (Eq. 10)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit.data import Bounds
from jemkit.errors import MisfitError
from jemkit.models.energy import EnergyFn, ModelEnergy
from jemkit.options import Options
from jemkit.sampling.reports import report

Ball = Literal["Linf", "L2"]
"""The norm of a ball that chains and gradient attacks are projected onto."""


@runtime_checkable
class StatelessKernel(Protocol):
    """A transition kernel without memory: pure in `x` and in what `rng` draws."""

    @property
    def needs_stem(self) -> bool:
        """Whether the energy must provide `stem` and `trunk`."""

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        """One transition of every row of x, [B, ...]."""


class KernelState(Protocol):
    """A named tuple of tensors whose first field is x [B, ...]; it lives as long as one chain."""

    @property
    def x(self) -> Tensor:
        """The images [B, ...]."""

    def _asdict(self) -> dict[str, Any]: ...

    def _replace(self, *, x: Tensor) -> Self: ...


@runtime_checkable
class Reporting(Protocol):
    """A kernel's state that says more of its step: by name, a number for each row or for all."""

    @property
    def info(self) -> Mapping[str, Tensor]: ...


S = TypeVar("S", bound=Tensor | KernelState)


@runtime_checkable
class StatefulKernel(Protocol[S]):
    """A transition kernel with memory, such as a momentum: pure in its state."""

    @property
    def needs_stem(self) -> bool:
        """Whether the energy must offer `stem` and `trunk`."""

    def init(self, x: Tensor, rng: Generator) -> S:
        """The state that a chain from x [B, ...] begins with."""

    def step(self, energy: EnergyFn, state: S, rng: Generator) -> S:
        """One transition of every row; `state.x` is [B, ...].

        The wrappers below may have moved `state.x` since the step before.
        """


Sampler = StatelessKernel | StatefulKernel[Any]
"""A transition kernel: one step of a chain, without memory or with a state."""


Gradient = Callable[[EnergyFn, Tensor], Tensor]  # an energy and x [B, ...] to dE/dx, row by row


def eager_gradient(energy: EnergyFn, x: Tensor) -> Tensor:
    return slope_at(energy, x.detach().requires_grad_())


def slope_at(energy: EnergyFn, leaf: Tensor) -> Tensor:
    """dE/dx at a leaf that requires a gradient."""
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf)
    return grad


_GRADIENT: ContextVar[Gradient] = ContextVar("gradient", default=eager_gradient)


def gradient(energy: EnergyFn, x: Tensor) -> Tensor:
    """dE/dx at each row of x [B, ...]; leaves every parameter's `.grad` alone."""
    return _GRADIENT.get()(energy, x)


@contextmanager
def gradients_by(unit: Gradient) -> Iterator[None]:
    """Compute every gradient of a chain inside the block by `unit`, such as a compiled gradient."""
    token = _GRADIENT.set(unit)
    try:
        yield
    finally:
        _GRADIENT.reset(token)


def chain(
    sampler: Sampler, energy: EnergyFn, x: Tensor, rng: Generator, steps: int, name: str = "sampler"
) -> Iterator[Tensor]:
    """The states x_1, ..., x_steps of a chain from x [B, ...], each detached.

    What the kernel reports is collected under `name`.
    """
    state = begin(sampler, x, rng)
    for _ in range(steps):
        state = _detached(sampler.step(energy, state, rng))
        if not isinstance(state, Tensor) and isinstance(state, Reporting):
            report(state.info, name)
        yield state if isinstance(state, Tensor) else state.x


def last(states: Iterator[Tensor], x: Tensor) -> Tensor:
    """The final state of a chain from x."""
    for state in states:
        x = state
    return x.detach()


def run(
    sampler: Sampler, energy: EnergyFn, x: Tensor, rng: Generator, steps: int, name: str = "sampler"
) -> Tensor:
    """The last x [B, ...] of a chain; no steps give x back."""
    return last(chain(sampler, energy, x, rng, steps, name), x)


def begin(sampler: Sampler, x: Tensor, rng: Generator) -> Any:
    """The state that a chain from x begins with: x itself where the kernel has no memory."""
    return sampler.init(x, rng) if isinstance(sampler, StatefulKernel) else x


def _detached(state: Tensor | KernelState) -> Tensor | KernelState:
    if isinstance(state, Tensor):
        return state.detach()
    tensors = {k: v.detach() for k, v in state._asdict().items() if isinstance(v, Tensor)}
    return state._replace(**tensors)


def noise_like(x: Tensor, rng: Generator) -> Tensor:
    """Standard normal noise of the shape, device and type of x [B, ...]."""
    return torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)


class SGLD(Options):
    """Stochastic gradient Langevin dynamics (Eq. 10), with separate step size and noise as in JEM.

        x <- x - step_size dE/dx + noise N(0, 1)

    Images are [B, ...]; both sizes are in model units, [-1, 1]. `clip` bounds each element of the
    gradient before the step.
    """

    needs_stem: ClassVar[bool] = False

    step_size: float = Field(1.0, ge=0)  # c^2 / 2 of Eq. 10, factor of dE/dx
    noise: float = Field(0.01, ge=0)  # c of Eq. 10, a standard deviation
    clip: float | None = Field(None, gt=0)  # limit of each element of dE/dx; None: none

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
    """Proximal YOPO-Langevin dynamics (JEM++, Yang and Ji 2021), of images [B, ...].

    One gradient of the trunk, then `inner_steps` that backpropagate only through the stem. If the
    stem is linear this equals noise-free SGLD with a step size of inner_steps * step_size, in model
    units. Raises MisfitError for an energy without a stem.
    """

    needs_stem: ClassVar[bool] = True

    inner_steps: int = Field(5, ge=1)  # steps for one gradient of the trunk
    step_size: float = Field(0.2, ge=0)  # factor of dE/dx
    clip: float | None = Field(1.0, gt=0)  # limit of each element of dE/dx; None: none

    def unused(self) -> dict[str, str]:
        idle = dict.fromkeys(("inner_steps", "clip"), "where step_size is 0")
        return {} if self.step_size else idle

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        if not isinstance(energy, ModelEnergy):
            raise MisfitError(
                "PYLD needs the gradient at the first layer's output: pass a ModelEnergy"
            )
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
    """Steepest descent in the L-infinity norm: PGD's step without the projection.

        x <- x - step_size sign(dE/dx)

    Images are [B, ...]; the size is in model units, [-1, 1].
    """

    needs_stem: ClassVar[bool] = False

    step_size: float = Field(0.01, ge=0)  # of each pixel

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        return x - self.step_size * gradient(energy, x).sign()


class L2Descent(Options):
    """Steepest descent in the L2 norm; a row whose gradient is 0 stays where it is.

        x <- x - step_size dE/dx / |dE/dx|

    Images are [B, ...]; the size is in model units, [-1, 1].
    """

    needs_stem: ClassVar[bool] = False

    step_size: float = Field(0.1, ge=0)  # length of a step

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        slope = gradient(energy, x)
        norm = rowwise(slope.flatten(1).norm(dim=1), slope)
        return x - self.step_size * torch.where(norm > 0, slope / norm, 0 * slope)


class _Wrapper(ABC):
    """`inner`, then move x to where it may be."""

    inner: Sampler

    @property
    def needs_stem(self) -> bool:
        return self.inner.needs_stem

    def init(self, x: Tensor, rng: Generator) -> Any:
        return begin(self.inner, x, rng)

    def step(self, energy: EnergyFn, state: Any, rng: Generator) -> Any:
        state = self.inner.step(energy, state, rng)
        if isinstance(state, Tensor):
            return self.project(state)
        return state._replace(x=self.project(state.x))

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """x [B, ...], moved."""


@dataclass(frozen=True)
class Boxed(_Wrapper):
    """`inner`, then clamp to the pixel range."""

    inner: Sampler
    bounds: Bounds

    def project(self, x: Tensor) -> Tensor:
        return self.bounds.clamp(x)


def perturbed(x: Tensor, radius: float, rng: Generator, norm: Ball = "Linf") -> Tensor:
    """x [B, ...] moved to a uniformly drawn point of the ball; `radius` is in tensor units."""
    if norm == "Linf":
        u = torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype)
        return x + radius * (2 * u - 1)
    n = noise_like(x, rng).flatten(1)
    share = torch.rand((len(x), 1), generator=rng, device=x.device, dtype=x.dtype)
    direction = F.normalize(n, dim=1) * share ** (1 / n.shape[1])
    return x + radius * direction.view_as(x)


@dataclass(frozen=True)
class Projected(_Wrapper):
    """`inner`, then project onto the ball of `radius` around `centre` and clamp to the pixel
    range."""

    inner: Sampler
    centre: Tensor
    radius: float  # in tensor units: Bounds.px turns pixels into them
    bounds: Bounds
    norm: Ball = "Linf"

    def project(self, x: Tensor) -> Tensor:
        delta = x - self.centre
        if self.norm == "Linf":
            delta = delta.clamp(-self.radius, self.radius)
        else:
            norm = rowwise(delta.flatten(1).norm(dim=1), delta)
            delta = torch.where(norm > self.radius, delta * (self.radius / norm), delta)
        return self.bounds.clamp(self.centre + delta)


def rowwise(value: Tensor, like: Tensor) -> Tensor:
    """One value per row, [B], reshaped to multiply `like`."""
    return value.view(-1, *[1] * (like.ndim - 1))
