"""PGD on the margin loss of Carlini and Wagner (S&P 2017), inside the ball."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Generator, Tensor

from jemkit import Criterion, CriterionFn, ModelAttack, PGDAttack, PixelModel, Threat, hookimpl
from jemkit.attacks.pgd import margin


class CW(PGDAttack):
    """Projected gradient ascent on max_{k != y} z_k - z_y, their f_6 without a target.

    Unlike that of the cross-entropy, the gradient of a logit difference does not vanish where the
    softmax is confident. The other form of their attack, the smallest L2 perturbation, is not
    implemented here.
    """

    steps: int = Field(20, ge=0)  # of each restart
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius
    restarts: int = Field(1, ge=1)  # starts; the worst image counts

    @property
    def label(self) -> str:
        return f"cw{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    def criterion(self, subject: PixelModel, x: Tensor, y: Tensor, rng: Generator) -> CriterionFn:
        def evaluated(z: Tensor) -> Criterion:
            logits = subject(z)
            return Criterion(-margin(logits, y), logits.argmax(1) != y)

        return evaluated

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        return {**super().card(threat, n_classes), "loss": "max_{k != y} z_k - z_y"}


@hookimpl
def jemkit_attacks() -> Mapping[str, type[ModelAttack]]:
    return {"cw": CW}
