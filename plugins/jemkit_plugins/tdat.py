"""TDAT (AAAI 2024): single-step adversarial training, started at the previous perturbation."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from jemkit import (
    Backbone, Ball, Batch, Objective, ObjectiveSpec, Options, Radius, Stream, Task, Terms, frozen,
    frozen_batch_stats, gradient, hookimpl, radius_of, watched,
)  # fmt: skip


class TDAT(Options):
    """CE of x~ with relaxed labels, and lambda mean |f(x_0) - f(x~)|^2 tanh(1 - p(y | x_0)).

    x_0 is x + m, where m is the last perturbation of the same position in the batch; x~ is one sign
    step of the size of the radius from x_0. With "paper" the regulariser has f(x) instead of f(x_0)
    and the norm is not squared, the label schedule uses tanh, and m has a momentum of 0.75.
    """

    needs_density: ClassVar[bool] = False
    norm: ClassVar[Ball] = "Linf"

    weight: float = Field(0.6, ge=0)  # lambda, the weight of the regulariser
    gamma_min: float = Field(0.15, gt=0, le=1)  # the smallest weight of the true label
    relaxation: float = Field(0.6, ge=0)  # beta of the label schedule
    radius_px: Radius | None = None  # None: the data set's
    # the authors' code, or the paper's formulas
    variant: Literal["released", "paper"] = "released"

    def unused(self) -> dict[str, str]:
        return {"relaxation": "where gamma_min is 1"} if self.gamma_min == 1 else {}

    def build(self, task: Task, rng: Generator) -> Objective[Any]:
        return TDATObjective(self, task)


class Draws(NamedTuple):
    """The perturbation at the start of a step and at its end; both [B, C, H, W]."""

    m: Tensor
    x_adv: Tensor


class TDATObjective:
    """Keeps m, one perturbation per position in the batch; at first a random corner of the ball."""

    needs_density: ClassVar[bool] = False

    def __init__(self, options: TDAT, task: Task) -> None:
        self.options, self.task = options, task
        self.m: Tensor | None = None

    @property
    def streams(self) -> tuple[Stream, ...]:
        return ("x", "x_adv") if self.options.weight else ("x_adv",)

    def gamma(self, step: int) -> float:
        """The weight of y, which falls by tan (paper: tanh) to `gamma_min` during training."""
        left = 1 - step / self.task.total_steps
        curve = math.tan if self.options.variant == "released" else math.tanh
        return min(1.0, max(self.options.gamma_min, self.options.relaxation * curve(left)))

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Draws:
        model, bounds, given = backbone.model, backbone.bounds, self.options.radius_px
        eps = bounds.px(radius_of("Linf", given, backbone.radius_px, "objective.radius_px"))
        m = self.m
        if m is None or m.shape != batch.x.shape:
            m = eps * torch.randn(batch.x.shape, generator=rng, device=batch.x.device).sign()
        m = m.to(batch.x.device)  # of a checkpoint it is on the CPU
        label = self.relaxed(batch)

        def loss(x: Tensor) -> Tensor:
            return F.cross_entropy(model(x).logits, label, reduction="none")

        with frozen(model), frozen_batch_stats(model):
            slope = gradient(loss, batch.x + m)
        delta = (m + eps * slope.sign()).clamp(-eps, eps)
        return Draws(m, bounds.clamp(batch.x + delta))

    def relaxed(self, batch: Batch) -> Tensor:
        """The labels of the attack, [B, K]: gamma on y, the rest distributed over other classes."""
        gamma, k = self.gamma(batch.step), self.task.n_classes
        label = torch.full((len(batch.y), k), (1 - gamma) / (k - 1), device=batch.y.device)
        return label.scatter_(1, batch.y[:, None], gamma)

    def loss(self, backbone: Backbone, batch: Batch, draws: Draws) -> Terms:
        weight, released = self.options.weight, self.options.variant == "released"
        first = batch.x + draws.m if released else batch.x
        images: dict[Stream, Tensor] = {"x": first} if weight else {}
        scores = backbone.scores({**images, "x_adv": draws.x_adv})
        z1, gamma = scores["x_adv"].logits, self.gamma(batch.step)
        smooth = F.cross_entropy(z1, batch.y, label_smoothing=1 - gamma)
        terms = {"p(y|x~)": (1.0, smooth)}
        if weight:
            z0 = scores["x"].logits
            far = (z0 - z1).square().sum(1) if released else (z0 - z1).norm(dim=1)
            sure = z0.softmax(1).gather(1, batch.y[:, None]).squeeze(1)
            terms["regulariser"] = (weight, (far * (1.0000001 - sure).tanh()).mean())
        return Terms.weighted(terms, watched({"x_adv": scores["x_adv"]}, batch.y))

    def after(self, backbone: Backbone, batch: Batch, draws: Draws, rng: Generator) -> None:
        delta = draws.x_adv - batch.x
        self.m = delta if self.options.variant == "released" else 0.75 * draws.m + 0.25 * delta

    def parameters(self) -> list[nn.Parameter]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"m": self.m}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.m = state["m"]


@hookimpl
def jemkit_objectives() -> Mapping[str, type[ObjectiveSpec]]:
    return {"tdat": TDAT}
