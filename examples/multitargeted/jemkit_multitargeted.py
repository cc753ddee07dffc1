"""The multi-targeted attack (Gowal et al. 2019): PGD towards one wrong class after another."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jemkit import (
    PGD, Criterion, CriterionFn, ModelAttack, Options, Perturb, PixelModel, Threat, ball_of,
    hookimpl,
)  # fmt: skip
from pydantic import Field
from torch import Generator, Tensor


class MultiTargeted(Options):
    """PGD on z_t - z_y for each wrong class t, the most likely first, until one is predicted.

    An image is attacked towards a class only if it is still classified correctly. Steps, starts and
    projections are those of `pgd`, in L-inf and L2; the other norm is refused.
    """

    everyone: ClassVar[bool] = False  # what is misclassified from the start is left as it is

    steps: int = Field(20, ge=0)  # towards each class, of each restart
    step_px: float | None = Field(None, ge=0)  # in 1/255; None: a quarter of the radius
    restarts: int = Field(1, ge=1)  # starts for each class
    targets: int | None = Field(None, ge=1)  # how many classes; None: all but the label

    def unused(self) -> dict[str, str]:
        return self._pgd.unused()

    @property
    def label(self) -> str:
        return f"mt{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        norm = ball_of(threat, self.label)

        def perturb(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
            with torch.no_grad():
                wrong = subject(x).scatter(1, y[:, None], -torch.inf)
            order = wrong.argsort(dim=1, descending=True)[:, :-1]  # [B, K - 1]
            x_adv = x.clone()
            for target in order[:, : self.targets].unbind(1):
                with torch.no_grad():
                    left = (subject(x_adv).argmax(1) == y).nonzero().squeeze(1)
                if len(left):
                    pull = towards(subject, target[left], y[left])
                    x_adv[left] = self._pgd.worst(pull, x[left], threat.radius_px, norm, rng)
            return x_adv

        return {self.label: perturb}

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        most = n_classes - 1
        targets = most if self.targets is None else min(self.targets, most)
        return {**self._pgd.card(threat, n_classes), "loss": "z_t - z_y", "targets": targets}

    @property
    def _pgd(self) -> PGD:
        return PGD(steps=self.steps, step_px=self.step_px, restarts=self.restarts)


def towards(subject: PixelModel, target: Tensor, y: Tensor) -> CriterionFn:
    """How far a class's logit leads that of the label, [B]; any wrong class is a success."""

    def evaluated(z: Tensor) -> Criterion:
        logits = subject(z)
        lead = logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])
        return Criterion(lead.squeeze(1), logits.argmax(1) != y)

    return evaluated


@hookimpl
def jemkit_attacks() -> Mapping[str, type[ModelAttack]]:
    return {"multitargeted": MultiTargeted}
