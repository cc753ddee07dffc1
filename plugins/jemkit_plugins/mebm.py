"""M-EBM (Yang and Ji, PAKDD 2023): an energy head beside the classifier, one Gaussian start."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Generator

from jemkit.backbone import Backbone, BackboneSpec, Task, assemble, without_batch_norm
from jemkit.data import Views
from jemkit.density import Buffer, Contrastive, DensitySpec
from jemkit.energy import EnergyModelSpec, LinearHead
from jemkit.hookspecs import hookimpl
from jemkit.networks import WRN, NetworkSpec
from jemkit.options import Options, PartOf
from jemkit.sampling import SGLD, Sampler
from jemkit.starts import Gaussian, StartSpec


class MEBM(Options):
    """The energy head's density, 5 steps of SGLD; with a classifier objective it is M-JEM."""

    network: Annotated[NetworkSpec, PartOf("network")] = WRN()
    energy: Annotated[EnergyModelSpec, PartOf("energy")] = LinearHead()
    density: Annotated[DensitySpec, PartOf("density")] = Contrastive(
        penalty=0.5, penalty_on="positives"
    )
    sampler: Annotated[Sampler, PartOf("sampler")] = SGLD(step_size=1.0, noise=0.0, clip=1.0)
    start: Annotated[StartSpec, PartOf("start")] = Gaussian()
    buffer: Buffer = Buffer(capacity=10_000, restart=0.05)
    steps: int = Field(5, ge=0)  # M
    views: Views = Views(augment_pos=False, pos_share=0.5)

    def unused(self) -> dict[str, str]:
        return without_batch_norm(self.network)

    def build(self, task: Task, rng: Generator) -> Backbone:
        return assemble(task, rng, **dict(self))


@hookimpl
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    return {"mebm": MEBM}


@hookimpl
def jemkit_recipes() -> Mapping[str, Mapping[str, Any]]:
    return {
        "backbone/mebm": {
            "optimizer": {"use": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
            "updater": {"use": "plain"},
            "schedule": {"decay": "steps", "at": [0.3, 0.6, 0.9], "by": 0.2},
            "run": {"epochs": 200, "batch_size": 128},
        }
    }
