"""EB-JDAT as in the code that its authors released in May 2025, for comparison with `ebjdat`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    Backbone, Batch, Boxed, LogitDistance, Objective, Options, Radius, SignDescent, Stream, Terms,
    eval_mode, frozen, hookimpl, perturbed, run, watched,
)  # fmt: skip


class Draws(NamedTuple):
    x_neg: Tensor  # [P, C, H, W]
    x_adv: Tensor  # [B, C, H, W]


class EBJDATReleased(Options):
    """The inner loop lowers E(x~, y), and h2 raises it; docs/readings.md has the differences.

    x~ is not projected: it moves at most adv_steps * step_px from its start. The distance term
    pushes its logits away from those of x, and h2 compares it with the density's images. All terms
    are computed.
    """

    needs_density: ClassVar[bool] = True

    w1: float = Field(1.0, gt=0)  # weight of h1
    w2: float = Field(0.1, gt=0)  # weight of h2
    w3: float = Field(1.0, gt=0)  # of the cross-entropy of x~
    w_clean: float = Field(1.0, gt=0)  # of the cross-entropy of x
    adv_steps: int = Field(5, ge=0)  # steps of the chain of x~
    start_px: Radius = 4.0  # 8/255 of the released code, in [-1, 1]
    step_px: float = Field(1.0, ge=0)  # its step size 2/255
    climbs: Literal["logit", "ce"] = "logit"  # f(x~)[y]; there, ce is commented out

    @property
    def streams(self) -> tuple[Stream, ...]:
        return ("x", "x_pos", "x_neg", "x_adv")

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Draws:
        x, y, model, bounds = batch.x, batch.y, backbone.model, backbone.bounds
        x_neg = backbone.density.draw(model, len(batch.x_pos), rng)
        kernel = Boxed(SignDescent(step_size=bounds.px(self.step_px)), bounds)
        with frozen(model), eval_mode(model):
            d = LogitDistance().bind(model, x, bounds)

            def energy(z: Tensor) -> Tensor:
                scores = model(z)
                if self.climbs == "logit":
                    return scores.joint(y) - d(z)
                return -F.cross_entropy(scores.logits, y, reduction="none") - d(z)

            start = bounds.clamp(perturbed(x, bounds.px(self.start_px), rng))
            return Draws(x_neg, run(kernel, energy, start, rng, self.adv_steps))

    def loss(self, backbone: Backbone, batch: Batch, draws: Draws) -> Terms:
        scores = backbone.scores(
            {"x": batch.x, "x_pos": batch.x_pos, "x_neg": draws.x_neg, "x_adv": draws.x_adv}
        )
        x, x_pos, x_neg, x_adv = (scores[stream] for stream in self.streams)
        terms = {
            "p(x)": (self.w1, backbone.density.loss(x_pos.energy, x_neg.energy)),
            "p(x~|x)": (self.w2, x_pos.energy.mean() - x_adv.energy.mean()),
            "p(y|x~)": (self.w3, F.cross_entropy(x_adv.logits, batch.y)),
            "p(y|x)": (self.w_clean, F.cross_entropy(x.logits, batch.y)),
        }
        return Terms.weighted(terms, watched(scores, batch.y))


@hookimpl
def jemkit_objectives() -> Mapping[str, type[Objective[Any]]]:
    return {"ebjdatreleased": EBJDATReleased}
