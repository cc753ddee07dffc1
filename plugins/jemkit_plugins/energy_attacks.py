"""Attacks on what a JEM has beside its classifier: its energy, and a detector made of it."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import Criterion, CriterionFn, ModelAttack, PGDAttack, PixelModel, Threat, hookimpl


class EnergyAttack(PGDAttack):
    """Projected gradient ascent of E(x, y), or of E(x); it keeps the highest energy it meets.

    No label is asked to change: accuracy under it says what is lost on the way.
    """

    of: Literal["x", "xy"] = "xy"
    steps: int = Field(20, ge=0)
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius
    restarts: int = Field(1, ge=1)

    @property
    def label(self) -> str:
        return "energy"

    def criterion(self, subject: PixelModel, x: Tensor, y: Tensor, rng: Generator) -> CriterionFn:
        def evaluated(z: Tensor) -> Criterion:
            scores = subject.scores(z)
            energy = scores.energy if self.of == "x" else scores.joint(y)
            return Criterion(energy, torch.zeros_like(energy, dtype=torch.bool))

        return evaluated

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        raised = {"x": "E(x)", "xy": "E(x, y)"}[self.of]
        best = "the highest energy of all steps"
        return {**super().card(threat, n_classes), "raised": raised, "kept": best}


class Detector(PGDAttack):
    """Fool the classifier and a detector that refuses images of high energy, both at once.

    An image falls where it is misclassified and its E(x~) is no higher than the detector lets
    pass: the 95th percentile of E over the clean images of its batch; an energy that is given;
    or, with `limit = "own"`, its own clean E(x), which passes wherever x did. Where no such x~
    is found the attack gives x itself. Accuracy under it is thus the share of images that are
    right and were not made wrong unseen; an image that is wrong from the start counts as wrong,
    whether the detector would see it or not.

    A step goes up the cross-entropy; from a point that is wrong but seen it goes down E(x).
    """

    limit: float | Literal["percentile", "own"] = "percentile"  # a number is an energy
    percentile: float = Field(95.0, gt=0, le=100)  # of all clean images, so all are attacked
    tolerance: float = Field(0.0, ge=0)  # added to the limit
    steps: int = Field(40, ge=0)
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius
    restarts: int = Field(1, ge=1)

    def unused(self) -> dict[str, str]:
        options_unused = super().unused()
        if self.limit != "percentile":
            options_unused["percentile"] = 'unless limit = "percentile"'
        return options_unused

    @property
    def label(self) -> str:
        return "detector"

    def criterion(self, subject: PixelModel, x: Tensor, y: Tensor, rng: Generator) -> CriterionFn:
        with torch.no_grad():
            limit = self.limits(subject.scores(x).energy)

        def evaluated(z: Tensor) -> Criterion:
            scores = subject.scores(z)
            loss = F.cross_entropy(scores.logits, y, reduction="none")
            wrong, detected = scores.logits.argmax(1) != y, ~(scores.energy <= limit)
            fallen = wrong & ~detected  # x stays where none falls
            raised = torch.where(wrong & detected, -scores.energy, loss)
            return Criterion(raised, fallen, rank=loss.where(fallen, -torch.inf))

        return evaluated

    def limits(self, clean: Tensor) -> Tensor:
        """The highest energy that passes, for each image of clean energies [B]."""
        if self.limit == "own":
            return clean + self.tolerance
        if self.limit == "percentile":
            return clean.quantile(self.percentile / 100).expand_as(clean) + self.tolerance
        return torch.full_like(clean, self.limit + self.tolerance)

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        limit = {
            "own": "E(x) of the clean image itself",
            "percentile": f"percentile {self.percentile:g} of E over the batch's clean images",
        }.get(str(self.limit), self.limit)
        return {
            **super().card(threat, n_classes),
            "counted": "wrong and E(x~) within the limit, or wrong without any attack",
            "limit": limit,
            "tolerance": self.tolerance,
            "kept": "the highest cross-entropy of those that fall; x itself where none does",
        }


@hookimpl
def jemkit_attacks() -> Mapping[str, type[ModelAttack]]:
    return {"energy": EnergyAttack, "detector": Detector}
