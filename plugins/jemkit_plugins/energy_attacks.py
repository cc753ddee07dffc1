"""Attacks on the energy of a JEM, and on a detector based on it."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import Criterion, CriterionFn, ModelAttack, PGDAttack, PixelModel, Threat, hookimpl


class EnergyAttack(PGDAttack):
    """Projected gradient ascent on E(x, y), or on E(x); returns the state of highest energy.

    The attack does not try to change the predicted class. Accuracy under it is the accuracy at high
    energies.
    """

    of: Literal["x", "xy"] = "xy"  # E(x) or E(x, y)
    steps: int = Field(20, ge=0)  # of each restart
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius
    restarts: int = Field(1, ge=1)  # starts; the worst image counts

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
    """Attacks the classifier and a detector that rejects images of high energy, both at once.

    An attack succeeds if the image is misclassified and its E(x~) is at most the limit of the
    detector: the 95th percentile of E over the clean images of the batch; a given energy; or, with
    `limit = "own"`, E(x) of the clean image, which accepts every x. If no such x~ is found the
    attack returns x. Accuracy under it is therefore the share of images that are correct and were
    not changed to an accepted wrong one. An image that is misclassified from the start counts as
    wrong, whether or not the detector would reject it.

    A step increases the cross-entropy; from a point that is misclassified but rejected it decreases
    E(x).
    """

    limit: float | Literal["percentile", "own"] = "percentile"  # a number is an energy
    percentile: float = Field(95.0, gt=0, le=100)  # of all clean images, so all are attacked
    tolerance: float = Field(0.0, ge=0)  # added to the limit
    steps: int = Field(40, ge=0)  # of each restart
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius
    restarts: int = Field(1, ge=1)  # starts; the worst image counts

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
            fallen = wrong & ~detected  # x if no attack succeeds
            raised = torch.where(wrong & detected, -scores.energy, loss)
            return Criterion(raised, fallen, rank=loss.where(fallen, -torch.inf))

        return evaluated

    def limits(self, clean: Tensor) -> Tensor:
        """The highest accepted energy, for each image of clean energies [B]."""
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
