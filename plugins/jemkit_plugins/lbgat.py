"""LBGAT (Cui et al., ICCV 2021): fits robust logits to those of a teacher of clean images."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from jemkit import (
    PGD, WRN, Attack, Backbone, Batch, EnergyModel, LogSumExp, NetworkPart, Objective,
    ObjectiveSpec, Options, PartOf, Stream, Task, Terms, Views, assemble, divergence,
    frozen_batch_stats, hookimpl, kl_adversary, watched,
)  # fmt: skip


class LBGAT(Options):
    """MSE(f(x~), g(x)) + CE(g(x), y) + beta KL(p(. | x) || p(. | x~)) of student f and teacher g.

    The teacher is trained together with the student. The squared error is a mean over images and
    classes, with a gradient for both. Labels reach the student only through the teacher.
    """

    needs_density: ClassVar[bool] = False

    beta: float = Field(6.0, ge=0)  # weight of the divergence
    # the attack for x~
    attack: Annotated[Attack, PartOf("attack")] = PGD(steps=10, start="gaussian")
    teacher: NetworkPart = WRN(depth=16, width=4)  # the recipe objective/lbgat sets the paper's

    def build(self, task: Task, rng: Generator) -> Objective[Any]:
        built = assemble(task, rng, network=self.teacher, energy=LogSumExp(), views=Views())
        return LBGATObjective(self, built.model)


class LBGATObjective:
    """Has the teacher, which is always in train mode: its running statistics are never used."""

    needs_density: ClassVar[bool] = False

    def __init__(self, options: LBGAT, teacher: EnergyModel) -> None:
        self.options, self.teacher = options, teacher

    @property
    def streams(self) -> tuple[Stream, ...]:
        return ("x_adv", "x") if self.options.beta else ("x_adv",)

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
        return kl_adversary(self.options.attack, backbone, batch.x, rng)

    def loss(self, backbone: Backbone, batch: Batch, x_adv: Tensor) -> Terms:
        beta = self.options.beta
        images: dict[Stream, Tensor] = {"x": batch.x} if beta else {}
        scores = backbone.scores({"x_adv": x_adv, **images})
        with frozen_batch_stats(self.teacher):
            taught = self.teacher(batch.x).logits
        adv = scores["x_adv"].logits
        terms = {
            "MSE": (1.0, F.mse_loss(adv, taught)),
            "p(y|x) of the teacher": (1.0, F.cross_entropy(taught, batch.y)),
        }
        if beta:
            terms["KL"] = (beta, divergence(scores["x"].logits, adv).mean())
        right = (taught.argmax(1) == batch.y).float().mean()
        return Terms.weighted(terms, {**watched(scores, batch.y), "accuracy of the teacher": right})

    def after(self, backbone: Backbone, batch: Batch, draws: Tensor, rng: Generator) -> None:
        return None

    def parameters(self) -> list[nn.Parameter]:
        return [*self.teacher.parameters()]

    def state_dict(self) -> dict[str, Any]:
        return self.teacher.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state)


@hookimpl
def jemkit_objectives() -> Mapping[str, type[ObjectiveSpec]]:
    return {"lbgat": LBGAT}
