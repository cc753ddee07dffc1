"""A classifier without a density: the backbone of adversarial training."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from torch import Generator

from jemkit import (
    WRN, Backbone, BackboneSpec, EnergyModelSpec, LogSumExp, NetworkSpec, Options, PartOf, Task,
    Views, assemble, hookimpl, without_batch_norm,
)  # fmt: skip


class Classifier(Options):
    """A network and its logits; its energies can be computed, but nothing samples from them."""

    has_density: ClassVar[bool] = False

    network: Annotated[NetworkSpec, PartOf("network")] = WRN()  # images to features
    energy: Annotated[EnergyModelSpec, PartOf("energy")] = LogSumExp()  # features to logits
    views: Views = Views()

    def unused(self) -> dict[str, str]:
        return without_batch_norm(self.network)

    def build(self, task: Task, rng: Generator) -> Backbone:
        return assemble(task, rng, network=self.network, energy=self.energy, views=self.views)


@hookimpl
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    return {"classifier": Classifier}
