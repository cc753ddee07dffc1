"""PGD-AT (Madry et al., ICLR 2018): adversarial training with PGD."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from torch import Generator, Tensor

from jemkit import (
    PGD, Attack, Backbone, Batch, Objective, Options, PartOf, Stream, Terms, ce_adversary,
    hookimpl, watched,
)  # fmt: skip


class PGDAT(Options):
    """-log p(y | x~) with x~ by PGD on the cross-entropy, in eval mode."""

    needs_density: ClassVar[bool] = False

    attack: Annotated[Attack, PartOf("attack")] = PGD(steps=10)  # the attack for x~

    @property
    def streams(self) -> tuple[Stream, ...]:
        return ("x_adv",)

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
        return ce_adversary(self.attack, backbone, batch.x, batch.y, rng)

    def loss(self, backbone: Backbone, batch: Batch, x_adv: Tensor) -> Terms:
        scores = backbone.scores({"x_adv": x_adv})
        term = F.cross_entropy(scores["x_adv"].logits, batch.y)
        return Terms.weighted({"p(y|x~)": (1.0, term)}, watched(scores, batch.y))


@hookimpl
def jemkit_objectives() -> Mapping[str, type[Objective[Any]]]:
    return {"pgdat": PGDAT}
