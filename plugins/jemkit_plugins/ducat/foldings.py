"""The accuracy of a model with dummy classes, by what is attacked."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from jemkit import (
    PGD, Context, Evaluator, Figure, Images, Options, PixelModel, Unmeasurable, batches, hookimpl,
)  # fmt: skip
from jemkit.metrics.figures import share
from jemkit_plugins.ducat.energy import DummyEnergy, Fold, read_as


class Foldings(Options):
    """Accuracy under PGD of a model with dummy classes, for each folding and on all 2K logits.

    An attack on 2K logits is misled: it counts the dummy of the true class as a success.
    """

    runs_attacks: ClassVar[bool] = False  # those of --attack

    steps: int = Field(20, ge=0)  # steps of PGD

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        model = subject.model
        if not isinstance(model, DummyEnergy):
            raise Unmeasurable("the model has no dummy classes to fold")
        if ctx.threat.norm == "L1":
            raise Unmeasurable("PGD, which attacks each folding, does not support L1")
        pgd, figures = PGD(steps=self.steps), []
        (perturb,) = pgd.bind(subject, ctx.threat).values()
        card = {**ctx.card, **pgd.card(ctx.threat, model.head.out_features // 2)}
        for attacked, judged in JUDGED.items():
            right = []
            for x, y in batches(data, ctx, f"{pgd.label} on folding {attacked}"):
                with read_as(model, attacked):
                    x_adv = perturb(x, y, ctx.rng)
                with read_as(model, judged), torch.no_grad():
                    right.append((subject(x_adv).argmax(1) == y).cpu())
            name, rows = f"{pgd.label}_{attacked}", torch.cat(right)
            how = {"attacked": attacked, "folded": judged}
            figures.append(share(name, int(rows.sum()), len(rows), {**card, **how}))
        return figures


JUDGED: dict[Fold | Literal["none"], Fold] = {"lse": "lse", "max": "max", "none": "max"}
"""The loss of an attack, and the folding with which its images are classified."""


@hookimpl
def jemkit_evaluators() -> Mapping[str, type[Evaluator]]:
    return {"foldings": Foldings}
