"""A classifier without density: the ground for adversarial training."""

from collections.abc import Mapping
from typing import Annotated

from torch import Generator

from jemkit.backbone import Backbone, BackboneSpec, Task, assemble, without_batch_norm
from jemkit.data import Views
from jemkit.energy import EnergyModelSpec, LogSumExp
from jemkit.hookspecs import hookimpl
from jemkit.networks import WRN, NetworkSpec
from jemkit.options import Options, PartOf


class Classifier(Options):
    """A network and its logits; its energies can be read, but nothing draws from them."""

    network: Annotated[NetworkSpec, PartOf("network")] = WRN()
    energy: Annotated[EnergyModelSpec, PartOf("energy")] = LogSumExp()
    views: Views = Views()

    def unused(self) -> dict[str, str]:
        views = dict.fromkeys(
            ("views.augment_pos", "views.noise_pos", "views.pos_share"),
            "on a classifier, which has no density",
        )
        return {**views, **without_batch_norm(self.network)}

    def build(self, task: Task, rng: Generator) -> Backbone:
        return assemble(task, rng, network=self.network, energy=self.energy, views=self.views)


@hookimpl
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    return {"classifier": Classifier}
