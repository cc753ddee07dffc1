"""FGSM (Goodfellow et al., ICLR 2015): a single step of the size of the radius."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Generator, Tensor

from jemkit import (
    PGD, ModelAttack, Options, Perturb, PixelModel, Threat, ball_of, hookimpl, run,
)  # fmt: skip
from jemkit.attacks.pgd import cross_entropy, negated
from jemkit.attacks.pixel_model import UNIT


class FGSM(Options):
    """x + eps sign(grad); in L2 x + eps grad / |grad|. Returns the final state."""

    everyone: ClassVar[bool] = True

    random_start: bool = False  # start uniformly in the ball; the step is projected onto it

    @property
    def label(self) -> str:
        return "fgsm"

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        norm = ball_of(threat, self.label)

        def perturb(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
            pgd = PGD(step_px=threat.radius_px)
            kernel = pgd.kernel(x, threat.radius_px, UNIT, norm)
            start = pgd.begin(kernel, rng) if self.random_start else x
            return run(kernel, negated(cross_entropy(subject, y)), start, rng, steps=1)

        return {self.label: perturb}

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        start = "uniform in the ball" if self.random_start else "x"
        return {
            "steps": 1,
            "step_px": threat.radius_px,
            "start": start,
            "kept": "the one step",
        }


@hookimpl
def jemkit_attacks() -> Mapping[str, type[ModelAttack]]:
    return {"fgsm": FGSM}
