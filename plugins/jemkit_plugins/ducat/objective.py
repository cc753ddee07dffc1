"""DUCAT (arXiv 2410.12671): a dummy class beside each class is the label of adversarial images."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    PGD, Attack, Backbone, Batch, MisfitError, Objective, ObjectiveSpec, Options, PartOf, Scores,
    Stream, Task, Terms, ce_adversary, divergence, hookimpl, watched,
)  # fmt: skip
from jemkit_plugins.ducat.energy import Fold, folded, read_as, with_dummies
from jemkit_plugins.ducat.terms import disagreement, margin, target

Parts = dict[str, tuple[float, Tensor]]
"""Terms by name, each with its weight."""


class DUCAT(Options):
    """PGD-AT with 2K classes; late in training x~ is labelled with its dummy, x partly.

    From the step of `start` on, targets are (1 - b) e_y + b e_(y + K) with b = `clean_dummy` for x
    and `adv_dummy` for x~. Those of x~ are multiplied by `adv_mass`; the loss is the mean over
    both. As in the released code, the attack is on the 2K logits. The variants of TRADES and MART
    add their other terms, over 2K classes. That of consistency trains on both views of a batch, and
    adds the Jensen-Shannon divergence of their adversarial images.
    """

    needs_density: ClassVar[bool] = False

    start: float = Field(0.8, ge=0, le=1)  # fraction of the run: 104 of 130 epochs
    clean_dummy: float = Field(0.25, ge=0, le=1)  # b of x
    adv_dummy: float = Field(1.0, ge=0, le=1)  # b of x~
    adv_mass: float = Field(1.0, gt=0)  # factor of the targets of x~
    # the method whose classes get dummies
    variant: Literal["pgdat", "trades", "mart", "consistency"] = "pgdat"
    beta: float = Field(6.0, ge=0)  # of the divergence, with variant "trades" or "mart"
    consistency: float = Field(1.0, ge=0)  # weight of that variant's divergence
    temperature: float = Field(0.5, gt=0)  # by which its logits are divided
    attack: Annotated[Attack, PartOf("attack")] = PGD(steps=10)  # the attack for x~

    @property
    def two_views(self) -> bool:
        """Whether the options of the density's view have an effect without a density."""
        return self.variant == "consistency"

    def unused(self) -> dict[str, str]:
        idle = ("clean_dummy", "adv_dummy", "adv_mass") if self.start == 1 else ()
        reasons = dict.fromkeys(idle, "where start is 1")
        if self.variant not in ("trades", "mart"):
            reasons["beta"] = f'where variant is "{self.variant}"'
        if self.variant != "consistency":
            both = ("consistency", "temperature")
            return {**reasons, **dict.fromkeys(both, 'unless variant = "consistency"')}
        return reasons if self.consistency else {**reasons, "temperature": "where consistency is 0"}

    def build(self, task: Task, rng: Generator) -> Objective[Any]:
        return DUCATObjective(self, task.total_steps)


class DUCATObjective:
    """The objective at a step: knows whether the dummy labels have begun."""

    needs_density: ClassVar[bool] = False
    streams: ClassVar[tuple[Stream, ...]] = ("x", "x_adv")

    def __init__(self, options: DUCAT, total_steps: int) -> None:
        self.options, self.total_steps = options, total_steps

    def check_backbone(self, backbone: Backbone) -> None:
        with_dummies(backbone.model)
        if self.options.variant == "consistency" and backbone.views.pos_share < 1:
            raise MisfitError(
                "the objective ducat needs two views of every image for variant = "
                f'"consistency", and backbone.views.pos_share is {backbone.views.pos_share:g}: set '
                "it to 1"
            )

    def images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images of a step, [B, C, H, W] or two views of each, [2B, C, H, W]; their labels."""
        if self.options.variant != "consistency":
            return batch.x, batch.y
        return torch.cat([batch.x, batch.x_pos]), batch.y.repeat(2)

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
        x, y = self.images(batch)
        with read_as(backbone.model, "none"):
            return ce_adversary(self.options.attack, backbone, x, y, rng)

    def loss(self, backbone: Backbone, batch: Batch, x_adv: Tensor) -> Terms:
        o, (x, y) = self.options, self.images(batch)
        late = batch.step >= o.start * self.total_steps
        both = late or o.variant in ("trades", "mart")
        images: dict[Stream, Tensor] = {"x": x} if both else {}
        fold: Fold = "max" if with_dummies(backbone.model).fold == "max" else "lse"
        with read_as(backbone.model, "none"):
            raw = backbone.scores({**images, "x_adv": x_adv})
        adv, clean = raw["x_adv"].logits, raw["x"].logits if both else None
        terms = {**self.labelled(clean, adv, y, late=late), **self.others(clean, adv, y)}
        scores = {name: Scores(folded(s.logits, fold), s.energy) for name, s in raw.items()}
        return Terms.weighted(terms, watched(scores, y))

    def labelled(self, clean: Tensor | None, adv: Tensor, y: Tensor, *, late: bool) -> Parts:
        """The cross-entropy of a variant, or that of soft labels once the dummies have begun."""
        o = self.options
        if late and clean is not None:
            of_clean = F.cross_entropy(clean, target(clean, y, o.clean_dummy))
            of_adv = o.adv_mass * F.cross_entropy(adv, target(adv, y, o.adv_dummy))
            return {"p(y|x)": (0.5, of_clean), "p(y|x~)": (0.5, of_adv)}
        if o.variant == "trades" and clean is not None:
            return {"p(y|x)": (1.0, F.cross_entropy(clean, y))}
        return {"p(y|x~)": (1.0, F.cross_entropy(adv, y))}

    def others(self, clean: Tensor | None, adv: Tensor, y: Tensor) -> Parts:
        """A variant's other terms: one divergence or another, and the margin of MART."""
        o, mart = self.options, self.options.variant == "mart"
        if o.variant == "consistency" and o.consistency:
            return {"JSD": (o.consistency, disagreement(adv, o.temperature))}
        if clean is None or o.variant not in ("trades", "mart"):
            return {}
        parts: Parts = {"margin": (1.0, margin(adv, y))} if mart else {}
        if o.beta:
            sure = clean.softmax(1).gather(1, y[:, None]).squeeze(1)
            weight = 1.0000001 - sure if mart else torch.ones_like(sure)
            parts["KL"] = (o.beta, (weight * divergence(clean, adv)).mean())
        return parts


@hookimpl
def jemkit_objectives() -> Mapping[str, type[ObjectiveSpec]]:
    return {"ducat": DUCAT}
