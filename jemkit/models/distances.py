"""Distances between a clean image and a perturbed one: d of Eq. 12."""

from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from jemkit.data import Bounds
from jemkit.models.energy import EnergyModel
from jemkit.options import Options

Measure = Callable[[Tensor], Tensor]
"""x~ [B, C, H, W] to its distance from the bound x, [B]."""


@runtime_checkable
class Distance(Protocol):
    """d(x, x~) >= 0 with d(x, x) = 0; whatever it needs of x is computed once, in `bind`."""

    min_size: ClassVar[int]  # pixels; smaller images are rejected before the first step

    def bind(self, model: EnergyModel, x: Tensor, bounds: Bounds) -> Measure:
        """Bind the clean images x [B, C, H, W]; returns d(x, .)."""


class NoDistance(Options):
    """No distance: the papers' rows without P."""

    min_size: ClassVar[int] = 1

    def bind(self, model: EnergyModel, x: Tensor, bounds: Bounds) -> Measure:
        return lambda x_adv: x_adv.new_zeros(len(x_adv))


class L2(Options):
    """Half the mean squared difference of the pixels, in the model's range."""

    min_size: ClassVar[int] = 1

    def bind(self, model: EnergyModel, x: Tensor, bounds: Bounds) -> Measure:
        return lambda x_adv: 0.5 * (x_adv - x).square().flatten(1).mean(1)


class LogitDistance(Options):
    """|| f(x)/|f(x)| - f(x~)/|f(x~)| ||^2, what the released EB-JDAT code calls perception loss."""

    min_size: ClassVar[int] = 1

    def bind(self, model: EnergyModel, x: Tensor, bounds: Bounds) -> Measure:
        clean = F.normalize(model(x).logits.detach(), dim=1)
        return lambda x_adv: (clean - F.normalize(model(x_adv).logits, dim=1)).square().sum(1)
