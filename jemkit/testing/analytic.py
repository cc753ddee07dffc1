"""Energies of points in the plane whose densities are known: moments, gradients, exact samples."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import ClassVar

import torch
from torch import Generator, Tensor

from jemkit.models.energy import EnergyFn, EnergyModel, Network, Scores


class AnalyticEnergy(ABC):
    """E(x) of x [B, 2], or [B, 2, 1, 1]; its density is exp(-E) up to a constant."""

    @abstractmethod
    def of(self, x: Tensor) -> Tensor:
        """E of points [B, 2], [B]."""

    @abstractmethod
    def slope(self, x: Tensor) -> Tensor:
        """dE/dx of points [B, 2] in closed form, [B, 2]."""

    @abstractmethod
    def points(self, n: int, rng: Generator) -> Tensor:
        """Independent samples of the density, [n, 2], float64."""

    @property
    @abstractmethod
    def known(self) -> Mapping[str, float]:
        """The means of x1, x2, x1^2 and x2^2."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.of(x.flatten(1))

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx of x, in its shape."""
        return self.slope(x.flatten(1)).view_as(x)

    def sample(self, n: int, rng: Generator) -> Tensor:
        """Independent samples of the density, [n, 2, 1, 1]."""
        return self.points(n, rng).float().view(n, 2, 1, 1)

    @property
    def moments(self) -> dict[str, float]:
        """Known means: of x and x^2, and of x dE/dx, which is 1 for every density."""
        return {**self.known, "x1 dE/dx1": 1.0, "x2 dE/dx2": 1.0}

    def measured(self, what: str, x: Tensor) -> Tensor:
        """The values, [B], whose mean is the moment of that name."""
        points = x.flatten(1).double()
        axis = int(what[1]) - 1
        if "dE" in what:
            return points[:, axis] * self.slope(points)[:, axis]
        return points[:, axis] ** (2 if what.endswith("^2") else 1)


def _moments(mean: Tensor, square: Tensor) -> dict[str, float]:
    values = {"x": mean, "x^2": square}
    return {
        what.replace("x", f"x{axis + 1}"): float(value[axis])
        for what, value in values.items()
        for axis in range(2)
    }


class GaussianEnergy(AnalyticEnergy):
    """A Gaussian with a mean and a standard deviation for each axis."""

    mean: ClassVar[Tensor] = torch.tensor([0.5, -0.5], dtype=torch.float64)
    std: ClassVar[Tensor] = torch.tensor([1.5, 1.0], dtype=torch.float64)

    def of(self, x: Tensor) -> Tensor:
        return (((x - self.mean.to(x)) / self.std.to(x)) ** 2).sum(1) / 2

    def slope(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x)) / self.std.to(x) ** 2

    def points(self, n: int, rng: Generator) -> Tensor:
        z = torch.randn((n, 2), generator=rng, dtype=torch.float64, device=rng.device)
        return self.mean + self.std * z

    @property
    def known(self) -> Mapping[str, float]:
        return _moments(self.mean, self.mean**2 + self.std**2)


class MixtureEnergy(AnalyticEnergy):
    """Two Gaussians of one width and unequal weight."""

    means: ClassVar[Tensor] = torch.tensor([[-1.5, 0.0], [1.5, 1.0]], dtype=torch.float64)
    weights: ClassVar[Tensor] = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def _logits(self, x: Tensor) -> Tensor:
        apart = (x[:, None] - self.means.to(x)).square().sum(2)
        return self.weights.to(x).log() - apart / 2

    def of(self, x: Tensor) -> Tensor:
        return -self._logits(x).logsumexp(1)

    def slope(self, x: Tensor) -> Tensor:
        share = self._logits(x).softmax(1)
        return x - share @ self.means.to(x)

    def points(self, n: int, rng: Generator) -> Tensor:
        which = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        z = torch.randn((n, 2), generator=rng, dtype=torch.float64, device=rng.device)
        return self.means[which] + z

    @property
    def known(self) -> Mapping[str, float]:
        return _moments(self.weights @ self.means, self.weights @ (self.means**2 + 1))


class _Line:
    """A density on a line by quadrature: exp(-E) on a fine grid."""

    def __init__(self, energy: Callable[[Tensor], Tensor], low: float, high: float) -> None:
        self.u = torch.linspace(low, high, 20_001, dtype=torch.float64, device="cpu")
        self.p = (-energy(self.u)).exp()
        self.p /= self.p.sum()

    def square(self) -> Tensor:
        return (self.p * self.u**2).sum()

    def sample(self, n: int, rng: Generator) -> Tensor:
        share = torch.rand(n, generator=rng, dtype=torch.float64, device=rng.device)
        return self.u[torch.searchsorted(self.p.cumsum(0), share).clamp(max=len(self.u) - 1)]


class DoubleWellEnergy(AnalyticEnergy):
    """Two wells along the first axis, (x1^2 - 2)^2 / 2, and a Gaussian along the second."""

    @cached_property
    def _first(self) -> _Line:
        return _Line(lambda u: (u**2 - 2) ** 2 / 2, -6, 6)

    def of(self, x: Tensor) -> Tensor:
        return (x[:, 0] ** 2 - 2) ** 2 / 2 + x[:, 1] ** 2 / 2

    def slope(self, x: Tensor) -> Tensor:
        return torch.stack([2 * x[:, 0] * (x[:, 0] ** 2 - 2), x[:, 1]], dim=1)

    def points(self, n: int, rng: Generator) -> Tensor:
        second = torch.randn(n, generator=rng, dtype=torch.float64, device=rng.device)
        return torch.stack([self._first.sample(n, rng), second], dim=1)

    @property
    def known(self) -> Mapping[str, float]:
        square = torch.stack([self._first.square(), torch.ones_like(self._first.square())])
        return _moments(torch.zeros_like(square), square)


class RingEnergy(AnalyticEnergy):
    """A ring of radius 3: (|x| - 3)^2 / 2."""

    radius: ClassVar[float] = 3.0

    @cached_property
    def _radial(self) -> _Line:
        return _Line(lambda r: (r - self.radius) ** 2 / 2 - r.log(), 1e-9, self.radius + 9)

    def of(self, x: Tensor) -> Tensor:
        r: Tensor = x.norm(dim=1)
        return (r - self.radius) ** 2 / 2

    def slope(self, x: Tensor) -> Tensor:
        r: Tensor = x.norm(dim=1, keepdim=True)
        return (r - self.radius) * x / r

    def points(self, n: int, rng: Generator) -> Tensor:
        r = self._radial.sample(n, rng)
        angle = torch.rand(n, generator=rng, dtype=torch.float64, device=rng.device) * 2 * torch.pi
        return torch.stack([r * angle.cos(), r * angle.sin()], dim=1)

    @property
    def known(self) -> Mapping[str, float]:
        half: Tensor = self._radial.square() / 2
        return _moments(torch.zeros_like(half).expand(2), half.expand(2))


class _Points(Network):
    """Points as their own features."""

    width = 2

    def stem(self, x: Tensor) -> Tensor:
        return x

    def trunk(self, h: Tensor) -> Tensor:
        return h


class _AnalyticModel(EnergyModel):
    """An energy of pixels as a model of one class."""

    def __init__(self, energy: EnergyFn) -> None:
        super().__init__()
        self.network, self.energy = _Points(), energy

    def read(self, features: Tensor) -> Scores:
        return Scores(features.flatten(1)[:, :1], self.energy(features))


def analytic_model(energy: EnergyFn) -> EnergyModel:
    """An energy function of x [B, ...] as a model, which samplers that need a stem take too."""
    return _AnalyticModel(energy)
