"""EB-JDAT (arXiv 2505.19459): learns the joint density of x, x~ and y by Algorithm 1."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    Ascent, Backbone, Ball, Batch, Distance, NoDistance, Objective, Options, PartOf, Projected,
    Radius, Scores, SignAscent, Stream, Terms, eval_mode, frozen, hookimpl, perturbed, radius_of,
    run, watched,
)  # fmt: skip


class Draws(NamedTuple):
    x_neg: Tensor | None  # x^- ~ p(x), [P, C, H, W]; None if w1 is 0
    x_adv: Tensor | None  # x~ ~ p(x~ | x), [B, C, H, W]; None if w2 and w3 are 0


class EBJDAT(Options):
    """log p(x, x~, y) = log p(y | x~, x) + log p(x~ | x) + log p(x) (Eq. 8).

    M is an option of the backbone, M_theta of the run. Where the paper leaves a choice open,
    docs/readings.md gives the reason for each default. `ebjdatreleased` implements the authors'
    released code, which differs.
    """

    needs_density: ClassVar[bool] = True

    w1: float = Field(0.45, ge=0)  # weight of h1; all three: Table 5, row 5
    w2: float = Field(0.05, ge=0)  # weight of h2, the energy gap
    w3: float = Field(0.45, ge=0)  # weight of h3, the cross-entropy of x~
    w_clean: float | None = Field(None, ge=0)  # of the clean cross-entropy; None: w3
    adv_steps: int = Field(5, ge=0)  # M_adv, Section 4.1
    radius_px: Radius | None = None  # of Omega, Eq. 5, in 1/255; None: the data set's
    norm: Ball = "Linf"  # of the ball
    ascent: Annotated[Ascent, PartOf("ascent")] = SignAscent()  # a step of the chain of x~
    inner: Literal["joint", "marginal", "ce"] = "joint"  # what x~ maximises; Eq. 12: joint
    outer: Literal["align", "squared", "contrastive"] = "align"  # h2; Eq. 11: align
    distance: Annotated[Distance, PartOf("distance")] = NoDistance()  # d of Eq. 13
    distance_weight: float = 1.0  # lambda of Eq. 12

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Draws:
        x, y, model, bounds = batch.x, batch.y, backbone.model, backbone.bounds
        x_neg = x_adv = None
        if self.w1:  # lines 6-9: x^- by the backbone's own chain, Eq. 10
            x_neg = backbone.density.draw(model, len(batch.x_pos), rng)
        if self.w2 or self.w3:  # lines 12-15: x~ from a perturbed x, inside the ball
            px = radius_of(self.norm, self.radius_px, backbone.radius_px, "objective.radius_px")
            ascent = self.ascent.kernel(x, px, bounds, self.norm)
            kernel = Projected(ascent, x, bounds.px(px), bounds, self.norm)
            with frozen(model), eval_mode(model):
                d = (self.distance if self.distance_weight else NoDistance()).bind(model, x, bounds)

                def energy(z: Tensor) -> Tensor:  # lambda d(x, x~) - E(x~, y), Eq. 12
                    return self.distance_weight * d(z) - self.climbed(model(z), y)

                start = bounds.clamp(perturbed(x, bounds.px(px), rng, self.norm))
                x_adv = run(kernel, energy, start, rng, self.adv_steps, name="ascent")
        return Draws(x_neg, x_adv)

    def climbed(self, scores: Scores, y: Tensor) -> Tensor:
        if self.inner == "ce":  # E(x~, y) - E(x~)
            return F.cross_entropy(scores.logits, y, reduction="none")
        return scores.joint(y) if self.inner == "joint" else scores.energy

    def loss(self, backbone: Backbone, batch: Batch, draws: Draws) -> Terms:
        images = {"x": batch.x, "x_pos": batch.x_pos, "x_neg": draws.x_neg, "x_adv": draws.x_adv}
        scores = backbone.scores({s: z for s in self.streams if (z := images[s]) is not None})
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.w1:  # line 10, Eq. 9
            h1 = backbone.density.loss(scores["x_pos"].energy, scores["x_neg"].energy)
            terms["p(x)"] = (self.w1, h1)
        if self.w2:  # line 16, the outer problem of Eq. 11
            gap = scores["x_adv"].energy - scores["x"].energy
            forms = {"align": gap, "squared": gap.square(), "contrastive": -gap}
            terms["p(x~|x)"] = (self.w2, forms[self.outer].mean())
        if self.w3:  # line 17
            terms["p(y|x~)"] = (self.w3, F.cross_entropy(scores["x_adv"].logits, batch.y))
        if self.clean:
            terms["p(y|x)"] = (self.clean, F.cross_entropy(scores["x"].logits, batch.y))
        return Terms.weighted(terms, watched(scores, batch.y))  # line 18

    @property
    def clean(self) -> float:
        return self.w3 if self.w_clean is None else self.w_clean

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that a term with a weight above 0 needs."""
        weights: dict[Stream, float] = {"x": self.w2 + self.clean, "x_pos": self.w1}
        weights |= {"x_neg": self.w1, "x_adv": self.w2 + self.w3}
        return tuple(stream for stream, weight in weights.items() if weight)

    def unused(self) -> dict[str, str]:
        step = ("ascent", "inner", "distance", "distance_weight")
        chain = ("adv_steps", "radius_px", "norm", *step)
        idle = {"distance_weight": "without a distance"} if self.distance == NoDistance() else {}
        idle |= {} if self.distance_weight else {"distance": "where distance_weight is 0"}
        idle |= {} if self.adv_steps else dict.fromkeys(step, "where adv_steps is 0")
        idle |= {} if self.w2 else {"outer": "where w2 is 0"}
        return idle if self.w2 or self.w3 else idle | dict.fromkeys(chain, "where w2 and w3 are 0")


@hookimpl
def jemkit_objectives() -> Mapping[str, type[Objective[Any]]]:
    return {"ebjdat": EBJDAT}
