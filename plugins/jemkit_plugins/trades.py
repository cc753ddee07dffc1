"""TRADES (Zhang et al., ICML 2019): trades accuracy for smoothness by a KL term."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    PGD, Attack, Backbone, Batch, Objective, Options, PartOf, Stream, Terms, ce_adversary,
    divergence, hookimpl, kl_adversary, soft_labels, watched,
)  # fmt: skip


class TRADES(Options):
    """-log p(y | x) + beta KL(p(. | x) || p(. | x~)), with x~ by PGD on the divergence.

    With climbs = "ce" x~ maximises the cross-entropy, as in AGR-TRADES.
    """

    needs_density: ClassVar[bool] = False
    mixes_labels: ClassVar[bool] = True

    beta: float = Field(6.0, ge=0)  # weight of the divergence
    climbs: Literal["kl", "ce"] = "kl"  # what x~ maximises
    attack: Annotated[Attack, PartOf("attack")] = PGD(steps=10)  # the attack for x~
    smoothing: float = Field(0.0, ge=0, lt=1)  # of the labels
    smooth: Literal["all", "generated"] = "all"  # images whose labels are smoothed

    def unused(self) -> dict[str, str]:
        idle = {} if self.smoothing else {"smooth": "where smoothing is 0"}
        attacks = dict.fromkeys(("attack", "climbs"), "where beta is 0")
        return idle if self.beta else {**idle, **attacks}

    @property
    def streams(self) -> tuple[Stream, ...]:
        return ("x", "x_adv") if self.beta else ("x",)

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor | None:
        if not self.beta:
            return None
        if self.climbs == "ce":
            return ce_adversary(self.attack, backbone, batch.x, batch.y, rng)
        return kl_adversary(self.attack, backbone, batch.x, rng)

    def loss(self, backbone: Backbone, batch: Batch, x_adv: Tensor | None) -> Terms:
        scores = backbone.scores(
            {"x": batch.x} if x_adv is None else {"x": batch.x, "x_adv": x_adv}
        )
        clean = scores["x"].logits
        terms = {"p(y|x)": (1.0, F.cross_entropy(clean, self._target(batch, clean.shape[1])))}
        if x_adv is not None:
            terms["KL"] = (self.beta, divergence(clean, scores["x_adv"].logits).mean())
        return Terms.weighted(terms, watched(scores, batch.y))

    def _target(self, batch: Batch, n_classes: int) -> Tensor:
        """Class indices [B], or distributions [B, K] if labels are smoothed or mixed."""
        if not self.smoothing and batch.mixed is None:
            return batch.y
        only = self.smooth == "generated"
        return soft_labels(batch, n_classes, self.smoothing, only_generated=only)


@hookimpl
def jemkit_objectives() -> Mapping[str, type[Objective[Any]]]:
    return {"trades": TRADES}
