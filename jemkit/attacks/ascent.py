"""Ascents: the step of a chain that climbs a loss inside a ball, sized by that ball."""

from typing import Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor

from jemkit.data import Bounds
from jemkit.options import Options
from jemkit.sampling.kernels import SGLD, Ball, L2Descent, Sampler, SignDescent


@runtime_checkable
class Ascent(Protocol):
    """The step of a chain in a ball around x; a registered part."""

    def kernel(self, x: Tensor, radius_px: float, bounds: Bounds, norm: Ball) -> Sampler:
        """The kernel for images x [B, C, H, W]; whoever runs it projects onto the ball.

        It descends an energy, which is the loss with its sign changed. `radius_px` is in 1/255.
        """


class SignAscent(Options):
    """Along the sign of the gradient: PGD's step."""

    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius

    def kernel(self, x: Tensor, radius_px: float, bounds: Bounds, norm: Ball) -> Sampler:
        size = radius_px / 4 if self.step_px is None else self.step_px
        if norm == "L2" and self.step_px is None:  # a quarter in L2, though every pixel moves
            size /= x[0].numel() ** 0.5
        return SignDescent(step_size=bounds.px(size))


class L2Ascent(Options):
    """Along the gradient, normalised for each image."""

    step_px: float | None = Field(None, ge=0)  # of the L2 norm; None: a quarter of the radius

    def kernel(self, x: Tensor, radius_px: float, bounds: Bounds, norm: Ball) -> Sampler:
        return L2Descent(
            step_size=bounds.px(radius_px / 4 if self.step_px is None else self.step_px)
        )


class SGLDAscent(SGLD):
    """Along the gradient itself, as Eq. 12 prints it: its step is c^2 / 2, without noise."""

    step_size: float = Field(0.01, ge=0)  # in model units, whatever the radius
    noise: float = Field(0.0, ge=0)  # standard deviation, in model units

    def kernel(self, x: Tensor, radius_px: float, bounds: Bounds, norm: Ball) -> Sampler:
        return self
