"""PGD on the margin loss of Carlini and Wagner (S&P 2017), inside the ball."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Generator, Tensor

from jemkit import PGD, Best, ModelAttack, Options, Perturb, PixelModel, Threat, ball_of, hookimpl
from jemkit.attacks.random_search import margin


class CW(Options):
    """Projected gradient ascent of max_{k != y} z_k - z_y, which is their f_6 without a target.

    A difference of logits: its slope does not fade where the softmax is sure of the label. The
    other form of their attack, the smallest L2 perturbation, is not this one.
    """

    everyone: ClassVar[bool] = True

    steps: int = Field(20, ge=0)
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius
    restarts: int = Field(1, ge=1)

    def unused(self) -> dict[str, str]:
        return {} if self.steps else {"step_px": "where steps is 0"}

    @property
    def label(self) -> str:
        return f"cw{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        norm = ball_of(threat, self.label)

        def perturb(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
            best = Best(x)

            def energy(z: Tensor) -> Tensor:
                logits = subject(z)
                loss = -margin(logits, y)
                best.see(z, loss, logits.argmax(1) != y)
                return -loss

            pgd = PGD(steps=self.steps, step_px=self.step_px, restarts=self.restarts)
            pgd.climb(energy, x, threat.radius_px, norm, rng)
            return best.x

        return {self.label: perturb}

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        plain = PGD(steps=self.steps, step_px=self.step_px, restarts=self.restarts)
        return {**plain.card(threat, n_classes), "loss": "max_{k != y} z_k - z_y"}


@hookimpl
def jemkit_attacks() -> Mapping[str, type[ModelAttack]]:
    return {"cw": CW}
