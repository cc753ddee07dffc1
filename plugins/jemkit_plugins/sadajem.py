"""SADA-JEM (Yang, Su and Ji, CVPR 2023): sharpness-aware, its density without augmentation."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Generator

from jemkit.backbone import Backbone, BackboneSpec, Task, assemble, without_batch_norm
from jemkit.data import Views
from jemkit.density import Buffer, Contrastive, DensitySpec
from jemkit.energy import EnergyModelSpec, LogSumExp
from jemkit.hookspecs import hookimpl
from jemkit.networks import WRN, NetworkSpec
from jemkit.options import Options, PartOf
from jemkit.sampling import SGLD, Sampler
from jemkit.starts import Mixture, StartSpec


class SADAJEM(Options):
    """A WideResNet with batch norm, 10 noise-free steps of clamped SGLD, class-wise Gaussians."""

    network: Annotated[NetworkSpec, PartOf("network")] = WRN()
    energy: Annotated[EnergyModelSpec, PartOf("energy")] = LogSumExp()
    density: Annotated[DensitySpec, PartOf("density")] = Contrastive()
    sampler: Annotated[Sampler, PartOf("sampler")] = SGLD(step_size=1.0, noise=0.0, clip=1.0)
    start: Annotated[StartSpec, PartOf("start")] = Mixture()
    buffer: Buffer = Buffer(capacity=10_000, restart=0.05)
    steps: int = Field(10, ge=0)  # M
    views: Views = Views(augment_pos=False, pos_share=0.5)

    def unused(self) -> dict[str, str]:
        return without_batch_norm(self.network)

    def build(self, task: Task, rng: Generator) -> Backbone:
        return assemble(task, rng, **dict(self))


@hookimpl
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    return {"sadajem": SADAJEM}


@hookimpl
def jemkit_recipes() -> Mapping[str, Mapping[str, Any]]:
    return {
        "backbone/sadajem": {
            "optimizer": {"use": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
            "updater": {"use": "sam", "rho": 2.0, "adaptive": True},
            "schedule": {"decay": "steps", "at": [0.3, 0.6, 0.9], "by": 0.2},
            "run": {"epochs": 200, "batch_size": 128},
        }
    }
