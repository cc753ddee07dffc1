"""DAT's backbone: a classifier from which new chains sample by ascent of a class logit."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from jemkit import (
    Bounds, Boxed, Buffer, Density, DensityPart, EnergyModel, JEMVariant, L2Descent, ModelEnergy,
    Options, ReplayBuffer, Sampler, SamplerPart, Start, StartPart, Steps, Views, eval_mode, frozen,
    run,
)  # fmt: skip
from jemkit_plugins.dat.starts import Blurred


class FreshChains(Options):
    """Draws new chains that descend E(x, y), in eval mode; the loss is binary cross-entropy.

    If no classes are given, image i of a batch has class i mod K. There is no replay buffer.
    """

    def build(
        self, sampler: Sampler, steps: int, start: Start, buffer: ReplayBuffer, bounds: Bounds
    ) -> Density:
        return FreshDensity(sampler, steps, start, buffer.n_classes, bounds)


class FreshDensity:
    """Keeps nothing between draws."""

    classwise: ClassVar[bool] = True
    deals: ClassVar[dict[str, str]] = {}

    def __init__(
        self, sampler: Sampler, steps: int, start: Start, n_classes: int, bounds: Bounds
    ) -> None:
        self.sampler, self.steps, self.start = sampler, steps, start
        self.n_classes, self.bounds = n_classes, bounds

    def draw(self, model: EnergyModel, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        return self.sample(model, n, rng, steps=self.steps, start=self.start, y=y)

    def sample(
        self,
        model: EnergyModel,
        n: int,
        rng: Generator,
        *,
        steps: int,
        start: Start,
        y: Tensor | None = None,
    ) -> Tensor:
        y = torch.arange(n, device=rng.device) % self.n_classes if y is None else y
        x, kernel = start.draw(n, rng, y), Boxed(self.sampler, self.bounds)
        with frozen(model), eval_mode(model):
            return run(kernel, ModelEnergy(model, y), x, rng, steps)

    def loss(self, positive: Tensor, negative: Tensor) -> Tensor:
        return logistic_loss(positive, negative)

    def mark(self) -> None:
        return None

    def rollback(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


def logistic_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Binary cross-entropy with -E as the logit, a mean over data [B] and negatives [n] together.

    It determines the zero of the energy, which a difference of energies does not.
    """
    return F.softplus(torch.cat([positive, -negative])).mean()


class DATBackbone(JEMVariant):
    """A WideResNet with batch norm; L2-normalised steps of chains that start out of distribution.

    The step size is 0.2 in [0, 1]; in training the objective's is used.
    """

    density: DensityPart = FreshChains()
    sampler: SamplerPart = L2Descent(step_size=0.4)
    start: StartPart = Blurred()
    buffer: Buffer = Buffer(capacity=1)
    steps: Steps = 32
    views: Views = Views()

    def unused(self) -> dict[str, str]:
        names = ("capacity", "restart", "conditional")
        why = 'where density is "fresh", which has no replay buffer'
        idle = {f"buffer.{name}": why for name in names}
        return {**super().unused(), **(idle if isinstance(self.density, FreshChains) else {})}
