"""Adversarial chains: a sampler on a loss turned upside down, inside a ball around x."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from jemkit.data import Bounds
from jemkit.modes import eval_mode, frozen
from jemkit.options import Options, Radius
from jemkit.sampling import Ball, L2Descent, Projected, Sampler, SignDescent, run

AttackLoss = Callable[[Tensor], Tensor]
"""Of x~ [B, C, H, W]; [B], and higher is worse for the classifier."""


@runtime_checkable
class Attack(Protocol):
    """Images near x on which a loss is high."""

    def draw(
        self,
        model: nn.Module,
        loss: AttackLoss,
        x: Tensor,
        rng: Generator,
        *,
        bounds: Bounds,
        radius_px: float,
    ) -> Tensor:
        """x~ [B, C, H, W], detached; `radius_px` serves where the attack names none itself."""
        ...


def perturbed(x: Tensor, radius: float, rng: Generator, norm: Ball = "Linf") -> Tensor:
    """x moved to a uniformly drawn point of the ball; `radius` in tensor units."""
    if norm == "Linf":
        u = torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype)
        return x + radius * (2 * u - 1)
    n = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype).flatten(1)
    share = torch.rand((len(x), 1), generator=rng, device=x.device, dtype=x.dtype)
    direction = F.normalize(n, dim=1) * share ** (1 / n.shape[1])
    return x + radius * direction.view_as(x)


class PGD(Options):
    """Projected gradient ascent (Madry et al. 2018) on any loss; sizes in 1/255 of the range."""

    steps: int = Field(10, ge=0)
    radius_px: Radius | None = None  # None: the data set's
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius
    norm: Ball = "Linf"

    def draw(
        self,
        model: nn.Module,
        loss: AttackLoss,
        x: Tensor,
        rng: Generator,
        *,
        bounds: Bounds,
        radius_px: float,
    ) -> Tensor:
        radius = radius_px if self.radius_px is None else self.radius_px
        step = bounds.px(radius / 4 if self.step_px is None else self.step_px)
        inner: Sampler = (
            SignDescent(step_size=step) if self.norm == "Linf" else L2Descent(step_size=step)
        )
        kernel = Projected(inner, x, bounds.px(radius), bounds, self.norm)
        start = kernel.project(perturbed(x, bounds.px(radius), rng, self.norm))
        with frozen(model), eval_mode(model):
            return run(kernel, lambda x: -loss(x), start, rng, self.steps)
