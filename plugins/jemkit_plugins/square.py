"""Square Attack (Andriushchenko et al., ECCV 2020) alone: random squares, no gradients."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from jemkit.attack import Attack, ModelAttack, Perturb, Threat
from jemkit.autoattack import Stage, package
from jemkit.hookspecs import hookimpl
from jemkit.options import Options
from jemkit.pixels import PixelModel


class Square(Options):
    """A search by squares at random places; it sees logits alone."""

    everyone: ClassVar[bool] = False

    queries: int = Field(5000, ge=1)
    restarts: int = Field(1, ge=1)

    @property
    def label(self) -> str:
        return "square"

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        return {"square": self._stage().bind(subject, threat)}

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
