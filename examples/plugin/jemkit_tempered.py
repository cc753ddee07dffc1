"""A JEM with a temperature: E(x) = -T logsumexp(f(x) / T), an example of a plug-in."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Generator, Tensor, nn

from jemkit import EnergyModel, Network, Options, PartOf, Sampler, Scores, hookimpl
from jemkit.backbone import Backbone, BackboneSpec, Task, assemble
from jemkit.data import Views
from jemkit.density import Buffer, Contrastive, DensitySpec
from jemkit.energy import EnergyModelSpec
from jemkit.networks import WRN, NetworkSpec
from jemkit.sampling import SGLD
from jemkit.starts import Mixture, StartSpec


class TemperedEnergy(EnergyModel):
    """A network's logits, read at a temperature; T = 1 is JEM's reading."""

    def __init__(self, network: Network, n_classes: int, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature
        self.head = nn.Linear(network.width, n_classes)

    def read(self, features: Tensor) -> Scores:
        logits = self.head(features)
        t = self.temperature
        return Scores(logits, -t * (logits / t).logsumexp(dim=1))


class TemperedReading(Options):
    """E(x) = -T logsumexp(f(x) / T)."""

    temperature: float = Field(2.0, gt=0)

    def build(self, network: Network, n_classes: int) -> EnergyModel:
        return TemperedEnergy(network, n_classes, self.temperature)


class Tempered(Options):
    """SADA-JEM's chains on a tempered energy."""

    network: Annotated[NetworkSpec, PartOf("network")] = WRN()
    energy: Annotated[EnergyModelSpec, PartOf("energy")] = TemperedReading()
    density: Annotated[DensitySpec, PartOf("density")] = Contrastive()
    sampler: Annotated[Sampler, PartOf("sampler")] = SGLD(step_size=1.0, noise=0.0, clip=1.0)
    start: Annotated[StartSpec, PartOf("start")] = Mixture()
    buffer: Buffer = Buffer(capacity=1000)
    steps: int = Field(10, ge=0)
    views: Views = Views(augment_pos=False, pos_share=0.5)

    def build(self, task: Task, rng: Generator) -> Backbone:
        return assemble(task, rng, **dict(self))


@hookimpl
def jemkit_energy_models() -> Mapping[str, type[EnergyModelSpec]]:
    return {"tempered": TemperedReading}


@hookimpl
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    return {"tempered": Tempered}


@hookimpl
def jemkit_recipes() -> Mapping[str, Mapping[str, Any]]:
    return {"backbone/tempered": {"updater": {"use": "sam", "rho": 2.0, "adaptive": True}}}
