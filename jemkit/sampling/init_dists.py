"""Initial distributions of chains: p_0."""

from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Generator, Tensor

from jemkit.data import Bounds, Task
from jemkit.options import Options
from jemkit.sampling.moments import (
    Form,
    check_groups,
    expanded,
    form_of,
    moments_of,
)


@runtime_checkable
class Start(Protocol):
    """An initial distribution of chains."""

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        """n images [n, C, H, W] in the model's range, of the classes y [n] if it has classes."""


@runtime_checkable
class StartSpec(Protocol):
    """Options of an initial distribution; a registered part."""

    def build(self, task: Task, device: torch.device) -> Start: ...


class Uniform(Options):
    """Uniform pixels, as in JEM."""

    def build(self, task: Task, device: torch.device) -> Start:
        return UniformStart(task.shape, task.bounds)


class Noise(Options):
    """Independent normal pixels around the middle of the range, clamped to it."""

    std: float = Field(1.0, gt=0)  # in model units

    def build(self, task: Task, device: torch.device) -> Start:
        return NoiseStart(task.shape, task.bounds, self.std)


class Gaussian(Options):
    """One Gaussian with the mean and covariance of the training images, as in M-EBM."""

    def build(self, task: Task, device: torch.device) -> Start:
        return MomentStart(task, classwise=False, device=device)


class Mixture(Options):
    """One Gaussian per class, JEM++'s informative initialisation."""

    def build(self, task: Task, device: torch.device) -> Start:
        return MomentStart(task, classwise=True, device=device)


class UniformStart:
    def __init__(self, shape: tuple[int, int, int], bounds: Bounds) -> None:
        self.shape, self.bounds = shape, bounds

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        u = torch.rand((n, *self.shape), generator=rng, device=rng.device)
        return self.bounds.from_unit(u)


class NoiseStart:
    def __init__(self, shape: tuple[int, int, int], bounds: Bounds, std: float) -> None:
        self.shape, self.bounds, self.std = shape, bounds, std

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        z = torch.randn((n, *self.shape), generator=rng, device=rng.device)
        return self.bounds.clamp(sum(self.bounds) / 2 + self.std * z)


GATHERED = 2**28  # numbers of Cholesky factors that are gathered at a time: 1 GiB of float32


class GaussianStart:
    """x = m_k + L_k z, L_k the Cholesky factor of class k's covariance; clamped to the range."""

    def __init__(self, means: Tensor, factors: Tensor, task: Task) -> None:
        self.means, self.factors = means, factors  # [K, D], [K, D, D] lower triangular
        self.shape, self.bounds = task.shape, task.bounds

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        k = len(self.means)
        z = torch.randn((n, self.means.shape[1]), generator=rng, device=rng.device)
        if k == 1:
            x = self.means + z @ self.factors[0].T
        else:
            if y is None:
                y = torch.randint(k, (n,), generator=rng, device=rng.device)
            on_cpu = z.device.type == "cpu"
            x = self._by_class(z, y) if on_cpu else self.means[y] + _products(self.factors, z, y)
        return self.bounds.clamp(x).view(n, *self.shape)

    def _by_class(self, z: Tensor, y: Tensor) -> Tensor:
        """One matrix product per class, so that each factor is read once; y is on the host."""
        x = torch.empty_like(z)
        for label in torch.unique(y).tolist():
            rows = y == label
            x[rows] = self.means[label] + (self.factors[label] @ z[rows].T).T
        return x


def _products(factors: Tensor, z: Tensor, y: Tensor) -> Tensor:
    """factors[y] z, row by row; in pieces, and without reading y, which would synchronise."""
    rows = max(1, GATHERED // factors[0].numel())
    pairs = zip(torch.split(z, rows), torch.split(y, rows), strict=True)
    pieces = [torch.bmm(factors[label], part.unsqueeze(2)).squeeze(2) for part, label in pairs]
    return torch.cat(pieces)


class Labelled:
    """An initial distribution that always has these classes."""

    def __init__(self, start: Start, y: Tensor) -> None:
        self.start, self.y = start, y

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        own = self.y[torch.arange(n, device=self.y.device) % len(self.y)]  # again from the first
        return self.start.draw(n, rng, own if y is None else y)


class LowRankStart:
    """x = m_k + B_k z + s_k e: the leading directions of a covariance and a diagonal; clamped."""

    def __init__(self, means: Tensor, basis: Tensor, spread: Tensor, task: Task) -> None:
        self.means, self.basis, self.spread = means, basis, spread  # [K, D], [K, D, R], [K, D]
        self.shape, self.bounds = task.shape, task.bounds

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        k, d, rank = self.basis.shape
        z = torch.randn((n, rank), generator=rng, device=rng.device)
        e = torch.randn((n, d), generator=rng, device=rng.device)
        if k == 1:
            y = torch.zeros(n, dtype=torch.int64, device=rng.device)
        elif y is None:
            y = torch.randint(k, (n,), generator=rng, device=rng.device)
        x = self.means[y] + _products(self.basis, z, y) + self.spread[y] * e
        return self.bounds.clamp(x).view(n, *self.shape)


class MomentStart:
    """The Gaussians of the training images, which are loaded or estimated at the first draw."""

    def __init__(self, task: Task, *, classwise: bool, device: torch.device) -> None:
        self.task, self.classwise, self.device = task, classwise, device
        self.form: Form = form_of(task, classwise=classwise)
        if task.fill:
            self.check()

    def check(self) -> None:
        """Reject what cannot have Gaussians, before anything slow."""
        if self.classwise:
            check_groups(self.task)

    @cached_property
    def gaussians(self) -> "GaussianStart | LowRankStart":
        """Loaded or estimated; DataError if there are none."""
        moments = moments_of(self.task, classwise=self.classwise)
        stored = {name: tensor.to(self.device) for name, tensor in moments.items()}
        means = stored["means"]
        if "basis" in stored:
            return LowRankStart(means, stored["basis"], stored["spread"], self.task)
        return GaussianStart(means, expanded(stored["factors"], means.shape[1]), self.task)

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        return self.gaussians.draw(n, rng, y)

    def tensors(self) -> dict[str, Tensor]:
        """The moments by their names in an exported model's file; loaded, or estimated."""
        moments = moments_of(self.task, classwise=self.classwise)
        return {f"{self.form.kind}.{name}": tensor for name, tensor in moments.items()}


def start_name(start: Start) -> str:
    """An initial distribution in a protocol: by its registered name, else by its class."""
    if isinstance(start, MomentStart):
        return str(start.form)
    return type(start).__name__.removesuffix("Start").lower()
