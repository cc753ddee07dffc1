"""JEAT (Zhu et al., ICCV 2021), reconstructed: JEM with adversarial images as positives.

The authors released no code. The loss follows a second-hand description; the constants are jemkit's
own (docs/rivals.md).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    PGD, Attack, Backbone, Batch, Objective, Options, PartOf, Stream, Terms, adversary, hookimpl,
    watched,
)  # fmt: skip


class Draws(NamedTuple):
    """The results of the chains of one step."""

    x_neg: Tensor | None  # x_K ~ p(x), [P, C, H, W]
    x_adv: Tensor  # [B, C, H, W]


class JEAT(Options):
    """-log p(x~, y) = CE(f(x~), y) + E(x~) - E(x_K), where x~ maximises E(x~, y) in the ball."""

    needs_density: ClassVar[bool] = True

    w_px: float = Field(1.0, ge=0)  # 0: PreJEAT, the cross-entropy alone
    attack: Annotated[Attack, PartOf("attack")] = PGD(steps=10)  # the attack for x~

    @property
    def streams(self) -> tuple[Stream, ...]:
        return ("x_adv", "x_neg") if self.w_px else ("x_adv",)

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Draws:
        model, y = backbone.model, batch.y
        x_neg = backbone.density.draw(model, len(batch.x_pos), rng) if self.w_px else None
        return Draws(
            x_neg, adversary(self.attack, backbone, lambda x: model(x).joint(y), batch.x, rng)
        )

    def loss(self, backbone: Backbone, batch: Batch, draws: Draws) -> Terms:
        images: dict[Stream, Tensor] = {} if draws.x_neg is None else {"x_neg": draws.x_neg}
        scores = backbone.scores({"x_adv": draws.x_adv, **images})
        adv = scores["x_adv"]
        terms = {"p(y|x~)": (1.0, F.cross_entropy(adv.logits, batch.y))}
        if draws.x_neg is not None:
            h = backbone.density.loss(adv.energy, scores["x_neg"].energy)
            terms["p(x~)"] = (self.w_px, h)
        return Terms.weighted(terms, watched(scores, batch.y))


@hookimpl
def jemkit_objectives() -> Mapping[str, type[Objective[Any]]]:
    return {"jeat": JEAT}
