"""Square Attack (Andriushchenko et al., ECCV 2020): random squares, no gradients."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from jemkit import Attack, ModelAttack, Options, Perturb, PixelModel, Shape, Threat, hookimpl
from jemkit.attacks.autoattack import QUERIES, Stage, package


class Square(Options):
    """A random search with square windows, which uses only logits.

    The squares shrink with the number of queries, as in the authors' program. With 5,000 queries it
    equals the Square attack of AutoAttack, which uses the first half of a schedule of 10,000.
    """

    everyone: ClassVar[bool] = False

    queries: int = Field(QUERIES, ge=1)  # passes for each image
    restarts: int = Field(1, ge=1)  # starts; the worst image counts

    @property
    def label(self) -> str:
        return "square"

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        return {"square": self._stage().bind(subject, threat)}

    def check_images(self, shape: Shape, threat: Threat) -> None:
        self._stage().check_images(shape, threat.norm)

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        return {
            **self._stage().card(n_classes),
            "access": "logits",
            "package": package(),
        }

    def _stage(self) -> Stage:
        return Stage("square", steps=self.queries, restarts=self.restarts)


@hookimpl
def jemkit_attacks() -> Mapping[str, type[Attack] | type[ModelAttack]]:
    return {"square": Square}
