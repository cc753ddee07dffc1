"""EB-JDAT (arXiv 2505.19459): the joint density of x, x~ and y, learnt as Algorithm 1 tells."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor

from jemkit import (
    SGLD, Backbone, Ball, Batch, Boxed, ConfigError, Distance, EnergyFn, L2Descent, NoDistance,
    Objective, Options, PartOf, Projected, Radius, Sampler, Scores, SignDescent, Stream, Terms,
    eval_mode, frozen, hookimpl, perturbed, radius_of, run, watched,
)  # fmt: skip
from jemkit.runtime import distributed


class Draws(NamedTuple):
    """What the chains of one step gave; None where no term of the loss asks for it."""

    x_neg: Tensor | None  # x^- ~ p(x), [P, C, H, W]
    x_adv: Tensor | None  # x~ ~ p(x~ | x), [B, C, H, W]


class EBJDAT(Options):
    """log p(x, x~, y) = log p(y | x~, x) + log p(x~ | x) + log p(x) (Eq. 8).

    Where the paper leaves a choice or its code differs, docs/readings.md gives the reason for each
    default. M is the backbone's, M_theta the run's; sizes ending in _px are in 1/255.
    """

    needs_density: ClassVar[bool] = True

    w1: float = Field(0.45, ge=0)  # of h1, h2, h3: Table 5, row 5
    w2: float = Field(0.05, ge=0)
    w3: float = Field(0.45, ge=0)
    w_clean: float | None = Field(None, ge=0)  # of the clean cross-entropy; None: w3
    adv_steps: int = Field(5, ge=0)  # M_adv, Section 4.1
    radius_px: Radius | None = None  # of the ball, Omega of Eq. 5; None: the data set's
    start_px: Radius | None = None  # of the first perturbation; None: the radius
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius
    step_size: float = Field(0.01, ge=0)  # c^2 / 2 of Eq. 12, for `step = "gradient"` alone
    step: Literal["sign", "gradient", "normalised"] = "sign"
    norm: Ball = "Linf"
    projection: bool = True
    inner: Literal["joint", "marginal", "ce"] = "joint"  # what the chain climbs; Eq. 12: joint
    direction: Literal["raise", "lower"] = "raise"
    outer: Literal["align", "contrastive", "abs", "squared", "hinge"] = "align"  # h2's form
    margin: float = Field(0.0, ge=0)  # of `outer = "hinge"`
    pair: Literal["same", "density"] = "same"  # the clean images that h2 compares with
    distance: Annotated[Distance, PartOf("distance")] = NoDistance()  # d of Eq. 13
    distance_weight: float = 1.0  # lambda of Eq. 12; negative pushes x~ away, as released

    @model_validator(mode="after")
    def _something_to_learn(self) -> "EBJDAT":
        if not (self.w1 or self.w2 or self.w3 or self.clean_weight):
            raise ConfigError("w1, w2, w3 and w_clean are all 0: nothing to learn")
        return self

    def unused(self) -> dict[str, str]:
        chain = ("adv_steps", "radius_px", "start_px", "norm", "projection")
        step = ("step", "step_px", "step_size", "inner", "direction", "distance", "distance_weight")
        found = {"margin": 'unless outer = "hinge"'} if self.outer != "hinge" else {}
        if self.step != "gradient":
            found["step_size"] = 'unless step = "gradient"'
        else:
            found["step_px"] = 'where step = "gradient", whose size is step_size'
        if isinstance(self.distance, NoDistance):
            found["distance_weight"] = "without a distance"
        elif not self.distance_weight:
            found["distance"] = "where distance_weight is 0"
        sized = self.step == "gradient" or self.step_px is not None
        if not self.projection and self.start_px is not None and sized:
            found["radius_px"] = "without projection, where start_px and the step's size are given"
        if not self.adv_steps:
            found |= dict.fromkeys((*step, "projection"), "where adv_steps is 0")
        if not self.w2:
            found |= dict.fromkeys(("outer", "margin", "pair"), "where w2 is 0")
        if not (self.w2 or self.w3):
            found |= dict.fromkeys((*chain, *step), "where w2 and w3 are 0")
        return found

    @property
    def clean_weight(self) -> float:
        return self.w3 if self.w_clean is None else self.w_clean

    @property
    def distances(self) -> list[Distance]:
        """The distance, where some weight asks for it."""
        asked = self.distance_weight and (self.w2 or self.w3)
        return [self.distance] if asked and not isinstance(self.distance, NoDistance) else []

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Draws:
        x_neg = x_adv = None
        if self.w1:  # lines 6-9: x^- by the backbone's own chain, Eq. 10
            x_neg = backbone.density.draw(backbone.model, len(batch.x_pos), rng)
        if self.w2 or self.w3:  # lines 12-15
            x_adv = self.adversary(backbone, batch, rng)
        return Draws(x_neg, x_adv)

    def adversary(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
        """x~: from a perturbed x, up the joint energy and not far from x in d (Eq. 12)."""
        bounds, radius = backbone.bounds, self._radius(backbone)
        start = radius if self.start_px is None else self.start_px
        with frozen(backbone.model), eval_mode(backbone.model):
            energy = self.inner_energy(backbone, batch)
            x = bounds.clamp(perturbed(batch.x, bounds.px(start), rng, self.norm))
            return run(self.kernel(backbone, batch.x), energy, x, rng, self.adv_steps)

    def inner_energy(self, backbone: Backbone, batch: Batch) -> EnergyFn:
        """What the chain descends: lambda d(x, .) - E(., y), Eq. 12."""
        far = [d.bind(backbone.model, batch.x, backbone.bounds) for d in self.distances]
        up = -1.0 if self.direction == "raise" else 1.0
        model, y = backbone.model, batch.y

        def energy(x: Tensor) -> Tensor:
            value = up * self._climbed(model(x), y)
            return value + sum(self.distance_weight * d(x) for d in far)

        return energy

    def _climbed(self, scores: Scores, y: Tensor) -> Tensor:
        if self.inner == "joint":
            return scores.joint(y)  # Eq. 12
        if self.inner == "marginal":
            return scores.energy  # Eq. 11
        return F.cross_entropy(scores.logits, y, reduction="none")  # E(x~, y) - E(x~)

    def kernel(self, backbone: Backbone, x: Tensor) -> Sampler:
        """The chain's step, and the ball that it stays in."""
        bounds, radius = backbone.bounds, self._radius(backbone)
        quarter = radius / 4
        if self.norm == "L2" and self.step == "sign":  # every pixel moves: as long as that in L2
            quarter /= x[0].numel() ** 0.5
        size = bounds.px(quarter if self.step_px is None else self.step_px)
        inner: Sampler = SignDescent(step_size=size)
        if self.step == "gradient":
            inner = SGLD(step_size=self.step_size, noise=0.0)
        elif self.step == "normalised":
            inner = L2Descent(step_size=size)
        if self.projection:
            return Projected(inner, x, bounds.px(radius), bounds, self.norm)
        return Boxed(inner, bounds)

    def loss(self, backbone: Backbone, batch: Batch, draws: Draws) -> Terms:
        scores = backbone.scores(self._streams(batch, draws))
        terms: dict[str, tuple[float, Tensor]] = {}
        if draws.x_neg is not None:  # line 10, Eq. 9
            h1 = backbone.density.loss(scores["x_pos"].energy, scores["x_neg"].energy)
            terms["p(x)"] = (self.w1, h1)
        if self.w2:  # line 16, the outer problem of Eq. 11
            if self.pair == "same":
                clean = scores["x"].energy
            else:  # of the whole batch, since `h2` need not be linear in it
                clean = distributed.mean(scores["x_pos"].energy)
            terms["p(x~|x)"] = (self.w2, self.h2(scores["x_adv"].energy - clean))
        if self.w3:  # line 17
            terms["p(y|x~)"] = (self.w3, F.cross_entropy(scores["x_adv"].logits, batch.y))
        if self.clean_weight:
            terms["p(y|x)"] = (self.clean_weight, F.cross_entropy(scores["x"].logits, batch.y))
        return Terms.weighted(terms, watched(scores, batch.y))  # line 18

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Those that some term of weight above 0 asks for."""
        asked: dict[Stream, bool] = {
            "x": bool(self.clean_weight or (self.w2 and self.pair == "same")),
            "x_pos": bool(self.w1 or (self.w2 and self.pair == "density")),
            "x_neg": bool(self.w1),
            "x_adv": bool(self.w2 or self.w3),
        }
        return tuple(stream for stream, is_asked in asked.items() if is_asked)

    def _streams(self, batch: Batch, draws: Draws) -> dict[Stream, Tensor]:
        """The images of `streams`; of what was drawn all that there is."""
        density = draws.x_neg is not None
        images: dict[Stream, Tensor | None] = {
            "x": batch.x if "x" in self.streams else None,
            "x_pos": batch.x_pos if density or (self.w2 and self.pair == "density") else None,
            "x_neg": draws.x_neg,
            "x_adv": draws.x_adv,
        }
        return {stream: x for stream, x in images.items() if x is not None}

    def h2(self, gap: Tensor) -> Tensor:
        """h2 of the one-to-one gaps E(x~) - E(x), [B]."""
        if self.outer == "align":
            return gap.mean()
        if self.outer == "contrastive":  # the released code: x~ as a second kind of negative
            return -gap.mean()
        if self.outer == "abs":
            return gap.abs().mean()
        if self.outer == "squared":
            return gap.square().mean()
        return F.relu(gap - self.margin).mean()

    def _radius(self, backbone: Backbone) -> float:
        return radius_of(self.norm, self.radius_px, backbone.radius_px, "objective.radius_px")


@hookimpl
def jemkit_objectives() -> Mapping[str, type[Objective[Any]]]:
    return {"ebjdat": EBJDAT}
