"""JEM++ (Yang and Ji, ICCV 2021): proximal YOPO-Langevin chains from an informative start."""

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
from jemkit.sampling import PYLD, Sampler
from jemkit.starts import Mixture, StartSpec


class JEMPP(Options):
    """A WideResNet with batch norm, 10 steps of PYLD from class-wise Gaussians, noisy views."""

    network: Annotated[NetworkSpec, PartOf("network")] = WRN()
    energy: Annotated[EnergyModelSpec, PartOf("energy")] = LogSumExp()
    density: Annotated[DensitySpec, PartOf("density")] = Contrastive()
    sampler: Annotated[Sampler, PartOf("sampler")] = PYLD(inner_steps=5, step_size=0.2, clip=1.0)
    start: Annotated[StartSpec, PartOf("start")] = Mixture()
    buffer: Buffer = Buffer(capacity=10_000, restart=0.05)
    steps: int = Field(10, ge=0)  # M
    views: Views = Views(noise_x=0.03, noise_pos=0.03)

    def unused(self) -> dict[str, str]:
        return without_batch_norm(self.network)

    def build(self, task: Task, rng: Generator) -> Backbone:
        return assemble(task, rng, **dict(self))


@hookimpl
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    return {"jempp": JEMPP}


@hookimpl
def jemkit_recipes() -> Mapping[str, Mapping[str, Any]]:
    return {
        "backbone/jempp": {
            "optimizer": {"use": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 4e-4},
            "updater": {"use": "plain"},
            "schedule": {"decay": "steps", "at": [1 / 3, 2 / 3, 5 / 6], "by": 0.2},
            "run": {"epochs": 150, "batch_size": 64},
        }
    }
