"""SCORE (Pang et al., ICML 2022): TRADES with squared distances of probabilities."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    PGD, Attack, Backbone, Batch, Objective, Options, PartOf, Stream, Terms, adversary, attack_mode,
    hookimpl, soft_labels, watched,
)  # fmt: skip


class SCORE(Options):
    """mean |p(x) - t|^2 + beta mean max(0, |p(x~) - p(x)|^2 - c), t the label as a vector."""

    needs_density: ClassVar[bool] = False
    mixes_labels: ClassVar[bool] = True

    beta: float = Field(4.0, ge=0)  # the released checkpoints: 3
    c: float = Field(0.0, ge=0, le=2)  # the largest squared distance of two distributions
    smoothing: float = Field(0.0, ge=0, lt=1)  # of the label
    attack: Annotated[Attack, PartOf("attack")] = PGD(steps=10)  # the attack for x~

    def unused(self) -> dict[str, str]:
        return {} if self.beta else dict.fromkeys(("attack", "c"), "where beta is 0")

    @property
    def streams(self) -> tuple[Stream, ...]:
        return ("x", "x_adv") if self.beta else ("x",)

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor | None:
        if not self.beta:
            return None
        model = backbone.model
        with attack_mode(self.attack, model), torch.no_grad():
            clean = model(batch.x).logits.softmax(1)

        def loss(x: Tensor) -> Tensor:
            return squared(model(x).logits.softmax(1), clean)

        return adversary(self.attack, backbone, loss, batch.x, rng)

    def loss(self, backbone: Backbone, batch: Batch, x_adv: Tensor | None) -> Terms:
        images: dict[Stream, Tensor] = {} if x_adv is None else {"x_adv": x_adv}
        scores = backbone.scores({"x": batch.x, **images})
        clean = scores["x"].logits.softmax(1)
        target = soft_labels(batch, clean.shape[1], self.smoothing)
        terms = {"p(y|x)": (1.0, squared(clean, target).mean())}
        if x_adv is not None:
            far = squared(scores["x_adv"].logits.softmax(1), clean)
            terms["|p(x~) - p(x)|^2"] = (self.beta, (far - self.c).relu().mean())
        return Terms.weighted(terms, watched(scores, batch.y))


def squared(p: Tensor, q: Tensor) -> Tensor:
    """The squared L2 distance of each row, [B]."""
    return (p - q).square().sum(1)


@hookimpl
def jemkit_objectives() -> Mapping[str, type[Objective[Any]]]:
    return {"score": SCORE}
