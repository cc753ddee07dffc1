"""AutoAttack (Croce and Hein, ICML 2020; for L1 ICML 2021), computed by pyautoattack."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from jemkit import (
    Attack, ModelAttack, Norm, Options, Perturb, PixelModel, Shape, Threat, hookimpl, nonstandard,
)  # fmt: skip
from jemkit.attacks.autoattack import QUERIES, Stage, package

Version = Literal["standard", "plus", "rand", "released"]

RELEASED = (
    "a replay of EB-JDAT's released evaluator, which is weaker than AutoAttack: 20 steps for 100 "
    "and the untargeted DLR loss for APGD-T. That it clamps FAB to [0, 1] on [-1, 1] images is "
    "not replayed"
)


class AutoAttack(Options):
    """The attacks of AutoAttack in sequence, each on the images still classified correctly.

    `standard`, `plus` (more restarts, untargeted attacks) and `rand` (gradients averaged over 20
    passes, for randomised models) are the published versions. With the same seed and batch size
    their result is the same for every image. `released` is what the released code of EB-JDAT calls
    AutoAttack.
    """

    everyone: ClassVar[bool] = False

    version: Version = "standard"  # version of AutoAttack

    @property
    def label(self) -> str:
        return "aa" if self.version == "standard" else f"aa-{self.version}"

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        parts = stages(self.version, threat.norm)
        return {stage.name: stage.bind(subject, threat) for stage in parts}

    def check_images(self, shape: Shape, threat: Threat) -> None:
        for stage in stages(self.version, threat.norm):
            stage.check_images(shape, threat.norm)

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        parts = stages(self.version, threat.norm)
        why = [reason for stage in parts for reason in stage.departures(n_classes)]
        if self.version == "released":
            why = [RELEASED, *why]
        settings = {stage.name: stage.card(n_classes) for stage in parts}
        return {
            "version": self.version,
            "stages": settings,
            "package": package(),
            **nonstandard(why),
        }


def stages(version: Version, norm: Norm) -> list[Stage]:
    """The attacks of a version, with pyautoattack's settings for a norm."""
    l1 = norm == "L1"
    square = Stage("square", steps=QUERIES)
    if version == "standard":
        ce = Stage("apgd-ce", restarts=5 if l1 else 1, widened=l1)
        targeted = Stage("apgd-t", targets=5 if l1 else 9, widened=l1)
        return [ce, targeted, Stage("fab-t"), square]
    if version == "plus":
        ce, dlr = Stage("apgd-ce", restarts=5), Stage("apgd-dlr", restarts=5)
        return [ce, dlr, Stage("fab", restarts=5), square, Stage("apgd-t"), Stage("fab-t")]
    if version == "rand":
        return [Stage("apgd-ce", eot=20), Stage("apgd-dlr", eot=20)]
    ce, dlr = Stage("apgd-ce", steps=20), Stage("apgd-dlr", steps=20)
    return [ce, dlr, Stage("fab-t", steps=20), square]


@hookimpl
def jemkit_attacks() -> Mapping[str, type[Attack] | type[ModelAttack]]:
    return {"aa": AutoAttack}
