"""WEAT (Mirza et al., ECCV 2024): TRADES weighted by the energies of clean images."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    PGD, Attack, Backbone, Batch, Objective, Options, PartOf, Stream, Terms, divergence, hookimpl,
    kl_adversary, watched,
)  # fmt: skip


class WEAT(Options):
    """mean w CE + beta mean w KL(p(. | x) || p(. | x~)), w = 1 / log(1 + exp |E(x)|), detached.

    The cross-entropy is of x~, or of x with `of = "natural"`. The weights are largest at E(x) = 0,
    where they are 1 / log 2; they are not normalised.
    """

    needs_density: ClassVar[bool] = False

    of: Literal["adversarial", "natural"] = "adversarial"  # images of the cross-entropy
    beta: float = Field(6.0, ge=0)  # weight of the divergence
    # the attack for x~
    attack: Annotated[Attack, PartOf("attack")] = PGD(steps=10, start="gaussian")

    def unused(self) -> dict[str, str]:
        return {} if self.attacks else {"attack": 'where beta is 0 and of = "natural"'}

    @property
    def attacks(self) -> bool:
        return bool(self.beta) or self.of == "adversarial"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return ("x", "x_adv") if self.attacks else ("x",)

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor | None:
        return kl_adversary(self.attack, backbone, batch.x, rng) if self.attacks else None

    def loss(self, backbone: Backbone, batch: Batch, x_adv: Tensor | None) -> Terms:
        images: dict[Stream, Tensor] = {} if x_adv is None else {"x_adv": x_adv}
        scores = backbone.scores({"x": batch.x, **images})
        clean, w = scores["x"], weights(scores["x"].energy.detach())
        judged: Stream = "x_adv" if self.of == "adversarial" else "x"
        ce = F.cross_entropy(scores[judged].logits, batch.y, reduction="none")
        terms = {"p(y|x~)" if judged == "x_adv" else "p(y|x)": (1.0, (w * ce).mean())}
        if self.beta:
            kl = divergence(clean.logits, scores["x_adv"].logits)
            terms["KL"] = (self.beta, (w * kl).mean())
        return Terms.weighted(terms, {**watched(scores, batch.y), "w": w.mean()})


def weights(energy: Tensor) -> Tensor:
    """1 / log(1 + exp |E|), [B]; close to 1 / |E| for large energies."""
    return 1 / F.softplus(energy.abs())


@hookimpl
def jemkit_objectives() -> Mapping[str, type[Objective[Any]]]:
    return {"weat": WEAT}
