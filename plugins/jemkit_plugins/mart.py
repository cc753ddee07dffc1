"""MART (Wang et al., ICLR 2020): misclassified images have a larger weight in the divergence."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    PGD, Attack, Backbone, Batch, Objective, Options, PartOf, Stream, Terms, ce_adversary,
    divergence, hookimpl, watched,
)  # fmt: skip


class MART(Options):
    """BCE(f(x~), y) + beta mean KL(p(. | x) || p(. | x~)) (1 - p(y | x)).

    BCE is the cross-entropy plus -log(1 - q), where q is the largest probability of another class.
    Nothing is detached: the divergence has a gradient for both arguments and for its weight.
    """

    needs_density: ClassVar[bool] = False

    beta: float = Field(6.0, ge=0)  # on a WideResNet; 5 on a ResNet-18
    # the attack for x~
    attack: Annotated[Attack, PartOf("attack")] = PGD(steps=10, start="gaussian")

    @property
    def streams(self) -> tuple[Stream, ...]:
        return ("x", "x_adv") if self.beta else ("x_adv",)

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
        return ce_adversary(self.attack, backbone, batch.x, batch.y, rng)

    def loss(self, backbone: Backbone, batch: Batch, x_adv: Tensor) -> Terms:
        images: dict[Stream, Tensor] = {"x": batch.x} if self.beta else {}
        scores = backbone.scores({**images, "x_adv": x_adv})
        adv = scores["x_adv"].logits
        terms = {"BCE": (1.0, boosted_cross_entropy(adv, batch.y))}
        if self.beta:
            clean = scores["x"].logits
            terms["KL"] = (self.beta, (uncertainty(clean, batch.y) * divergence(clean, adv)).mean())
        return Terms.weighted(terms, watched(scores, batch.y))


def boosted_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy, and -log(1 - q) of the most probable wrong class, a scalar."""
    p = logits.softmax(1)
    wrong = p.scatter(1, y[:, None], -1.0).argmax(1, keepdim=True)
    q = p.gather(1, wrong).squeeze(1)
    return F.cross_entropy(logits, y) - (1.0001 - q + 1e-12).log().mean()


def uncertainty(logits: Tensor, y: Tensor) -> Tensor:
    """1 - p(y | x) of each row, [B]; 0 if the model is certain of y."""
    return 1.0000001 - logits.softmax(1).gather(1, y[:, None]).squeeze(1)


@hookimpl
def jemkit_objectives() -> Mapping[str, type[Objective[Any]]]:
    return {"mart": MART}
