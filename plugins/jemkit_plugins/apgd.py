"""Auto-PGD (Croce and Hein, ICML 2020; for L1 ICML 2021): PGD with an adaptive step size."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from jemkit import Attack, ModelAttack, Options, Perturb, PixelModel, Threat, hookimpl, nonstandard
from jemkit.attacks.autoattack import Stage, package


class APGD(Options):
    """Auto-PGD on the cross-entropy or the difference-of-logits ratio.

    In L1 it starts in larger balls, as in AutoAttack.
    """

    everyone: ClassVar[bool] = False

    steps: int = Field(100, ge=3)  # of each restart
    restarts: int = Field(1, ge=1)  # starts; the worst image counts
    loss: Literal["ce", "dlr"] = "ce"  # what it maximises
    eot: int = Field(1, ge=1)  # gradients to average per step, for a randomised model

    @property
    def label(self) -> str:
        return "apgd"

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        stage = self._stage(threat)
        return {stage.name: stage.bind(subject, threat)}

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        stage = self._stage(threat)
        return {
            **stage.card(n_classes),
            **nonstandard(stage.departures(n_classes)),
            "package": package(),
        }

    def _stage(self, threat: Threat) -> Stage:
        return Stage(
            "apgd-ce" if self.loss == "ce" else "apgd-dlr",
            steps=self.steps,
            restarts=self.restarts,
            eot=self.eot,
            widened=threat.norm == "L1",
        )


@hookimpl
def jemkit_attacks() -> Mapping[str, type[Attack] | type[ModelAttack]]:
    return {"apgd": APGD}
