"""DUCAT (arXiv 2410.12671): a dummy class beside each class is the label of adversarial images."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    PGD, Attack, Backbone, Batch, Objective, ObjectiveSpec, Options, PartOf, Scores, Stream, Task,
    Terms, ce_adversary, divergence, hookimpl, watched,
)  # fmt: skip
from jemkit_plugins.ducat.energy import Fold, folded, read_as, with_dummies

Parts = dict[str, tuple[float, Tensor]]
"""Terms by name, each with its weight."""


class DUCAT(Options):
    """PGD-AT with 2K classes; late in training x~ is labelled with its dummy, x partly.

    From the step of `start` on, targets are (1 - b) e_y + b e_(y + K) with b = `clean_dummy` for x
    and `adv_dummy` for x~. Those of x~ are multiplied by `adv_mass`; the loss is the mean over
    both. As in the released code, the attack is on the 2K logits. The variants of TRADES and MART
    add their other terms, over 2K classes.
    """

    needs_density: ClassVar[bool] = False

    start: float = Field(0.8, ge=0, le=1)  # fraction of the run: 104 of 130 epochs
    clean_dummy: float = Field(0.25, ge=0, le=1)
    adv_dummy: float = Field(1.0, ge=0, le=1)
    adv_mass: float = Field(1.0, gt=0)
    variant: Literal["pgdat", "trades", "mart"] = "pgdat"
    beta: float = Field(6.0, ge=0)  # of the divergence, with variant "trades" or "mart"
    attack: Annotated[Attack, PartOf("attack")] = PGD(steps=10)

    def unused(self) -> dict[str, str]:
        idle = ("clean_dummy", "adv_dummy", "adv_mass") if self.start == 1 else ()
        alone = {"beta": 'where variant is "pgdat"'} if self.variant == "pgdat" else {}
        return {**dict.fromkeys(idle, "where start is 1"), **alone}

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

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
        with read_as(backbone.model, "none"):
            return ce_adversary(self.options.attack, backbone, batch.x, batch.y, rng)

    def loss(self, backbone: Backbone, batch: Batch, x_adv: Tensor) -> Terms:
        o, y = self.options, batch.y
        late = batch.step >= o.start * self.total_steps
        both = late or o.variant != "pgdat"
        images: dict[Stream, Tensor] = {"x": batch.x} if both else {}
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
        """The divergence of TRADES, or the margin and the weighted divergence of MART."""
        o, mart = self.options, self.options.variant == "mart"
        if clean is None or o.variant == "pgdat":
            return {}
        parts: Parts = {"margin": (1.0, margin(adv, y))} if mart else {}
        if o.beta:
            sure = clean.softmax(1).gather(1, y[:, None]).squeeze(1)
            weight = 1.0000001 - sure if mart else torch.ones_like(sure)
            parts["KL"] = (o.beta, (weight * divergence(clean, adv)).mean())
        return parts


def margin(raw: Tensor, y: Tensor) -> Tensor:
    """-log(1 - q), q the largest probability of all 2K but y; a scalar."""
    p = raw.softmax(1)
    wrong = p.scatter(1, y[:, None], -1.0).argmax(1, keepdim=True)
    return -(1.0001 - p.gather(1, wrong).squeeze(1) + 1e-12).log().mean()


def target(raw: Tensor, y: Tensor, dummy: float) -> Tensor:
    """Targets with 1 - b on class y and b on its dummy, [B, 2K]."""
    label = torch.zeros_like(raw).scatter(1, y[:, None], 1 - dummy)
    return label.scatter_add(1, y[:, None] + raw.shape[1] // 2, torch.full_like(raw[:, :1], dummy))


@hookimpl
def jemkit_objectives() -> Mapping[str, type[ObjectiveSpec]]:
    return {"ducat": DUCAT}
