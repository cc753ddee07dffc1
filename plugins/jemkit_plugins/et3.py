"""ET3 (arXiv 2603.26984, CVPR 2026): a test-time defence that lowers the energy of its input.

The constants are jemkit's own.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from jemkit import (
    PGD, Ball, Context, Evaluator, Figure, Images, Options, PixelModel, Projected, Radius,
    Scores, SignDescent, Unmeasurable, ball_of, batches, hookimpl,
)  # fmt: skip
from jemkit.attacks.pixel_model import UNIT
from jemkit.metrics.attack_runner import attacked
from jemkit.metrics.figures import joined, share
from jemkit.sampling.kernels import rowwise

BOTH = "with its defence, and without it: an image counts as robust if it withstands both attacks"
OBLIVIOUS = "the attack ignores the defence, so it overestimates robustness"


class ET3(Options):
    """Accuracy of a model that first descends -logsumexp f(x) by `steps` steps in a small ball.

    Measured on clean images and under each attack. Each attack is run through the defence with its
    exact gradient (that of a sign is 0), and on the model without the defence, since a defence can
    hide the gradient. An image counts as robust if it withstands both. The second attack alone is a
    figure labelled oblivious. Of AutoAttack it attacks only the images that the undefended model
    classifies correctly.
    """

    steps: int = Field(0, ge=0)  # the paper's 1 or 2; 0: no defence, nothing is measured
    radius_px: Radius | None = None  # of the ball around the input; None: the attack's
    step_px: float | None = Field(None, ge=0)  # None: the radius over the steps
    direction: Literal["sign", "l2"] = "sign"  # of a step

    def unused(self) -> dict[str, str]:
        idle = dict.fromkeys(("radius_px", "step_px", "direction"), "where steps is 0")
        return {} if self.steps else idle

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        if not self.steps:
            raise Unmeasurable("no test-time defence was requested: set et3.steps to 1 or 2")
        if ctx.threat.norm == "L1":
            raise Unmeasurable("the defence descends in balls of Linf and L2, not of L1")
        if type(subject) is not PixelModel:
            raise Unmeasurable(
                "the defence is measured on a model itself: neither with --refine-steps, nor on "
                "a model without gradients"
            )
        radius = ctx.threat.radius_px if self.radius_px is None else self.radius_px
        defended = Descended(subject, self, radius, ball_of(ctx.threat, "et3"))
        card = joined(ctx.card, {"defence": defended.card, "standard": False, "why": defended.why})
        inner, figures = replace(ctx, card=card), [self._clean(defended, data, ctx, card)]
        for name, attack in (ctx.attacks or {"pgd": PGD(steps=20)}).items():
            past = attacked(subject, attack, data, inner, name)
            withstood = right_of(defended, Images(past.x_adv, data.y), ctx)
            through = attacked(defended, attack, data, inner, name)
            label, n = f"et3/{through.label}", len(data.y)
            both = int((withstood & through.right).sum())
            how = {**through.protocol, "attacked": BOTH}
            figures.append(share(label, both, n, how))
            how = joined(past.protocol, {"attacked": "without its defence", "why": OBLIVIOUS})
            figures.append(share(f"{label}/oblivious", int(withstood.sum()), n, how))
        return figures

    def _clean(
        self, defended: "Descended", data: Images, ctx: Context, card: dict[str, Any]
    ) -> Figure:
        right = right_of(defended, data, ctx)
        return share("et3", int(right.sum()), len(right), card)


class Descended(PixelModel):
    """A model that first lowers the energy of its input, each image by itself."""

    def __init__(self, subject: PixelModel, options: ET3, radius_px: float, norm: Ball) -> None:
        super().__init__(subject.model, subject.bounds, subject.density_or_none, subject.dtype)
        self.poll, self.options, self.norm = subject.poll, options, norm
        self.radius_px = radius_px
        given = options.step_px
        self.step_px = radius_px / options.steps if given is None else given

    @property
    def card(self) -> dict[str, Any]:
        """The entries of a figure's protocol about the defence."""
        sizes = {"radius_px": self.radius_px, "step_px": self.step_px, "norm": self.norm}
        return {"name": "et3", **self.options.model_dump(), **sizes}

    @property
    def why(self) -> str:
        return f"the model lowers the energy of its input by {self.options.steps} steps (et3)"

    def scores(self, pixels: Tensor) -> Scores:
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255
        return self.scored(self.bounds.from_unit(self.descend(pixels)))

    def descend(self, pixels: Tensor) -> Tensor:
        """The final states of the steps from images in [0, 1], with a graph if these need one."""
        size = UNIT.px(self.step_px)
        ball = Projected(SignDescent(), pixels, UNIT.px(self.radius_px), UNIT, self.norm)
        x = pixels
        for _ in range(self.options.steps):
            self.poll()
            x = ball.project(x - size * self._direction(self._slope(x)))
        return x

    def _direction(self, slope: Tensor) -> Tensor:
        if self.options.direction == "sign":
            return slope.sign()
        squares = rowwise(slope.flatten(1).square().sum(1), slope)
        moving = squares > 0
        return torch.where(moving, slope / torch.where(moving, squares, 1.0).sqrt(), 0.0)

    def _slope(self, x: Tensor) -> Tensor:
        """The gradient of -logsumexp f at each image, with a graph if x has one."""
        attached = x.requires_grad and torch.is_grad_enabled()
        curved = attached and self.options.direction != "sign"
        with torch.enable_grad():
            z = x if attached else x.detach().requires_grad_()
            energy = -self.scored(self.bounds.from_unit(z)).logits.logsumexp(1)
            if not energy.requires_grad:  # a model without gradients does not move its input
                return torch.zeros_like(x)
            (slope,) = torch.autograd.grad(energy.sum(), z, create_graph=curved)
        return slope

    def extra_repr(self) -> str:
        return str(self.card)


def right_of(subject: PixelModel, data: Images, ctx: Context) -> Tensor:
    """Which images a model classifies correctly, [N]."""
    with torch.no_grad():
        return torch.cat([(subject(x).argmax(1) == y).cpu() for x, y in batches(data, ctx)])


@hookimpl
def jemkit_evaluators() -> Mapping[str, type[Evaluator]]:
    return {"et3": ET3}
