"""A JEM with a temperature: E(x) = -T logsumexp(f(x) / T), an example of a plug-in."""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn

from jemkit import (
    BackboneSpec, EnergyModel, EnergyModelSpec, EnergyPart, JEMVariant, Network, Options, Scores,
    hookimpl,
)  # fmt: skip


class TemperedEnergy(EnergyModel):
    def __init__(self, network: Network, n_classes: int, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature
        self.head = nn.Linear(network.width, n_classes)

    def read(self, features: Tensor) -> Scores:
        logits, t = self.head(features), self.temperature
        return Scores(logits, -t * (logits / t).logsumexp(dim=1))


class TemperedReading(Options):
    temperature: float = Field(2.0, gt=0)

    def build(self, network: Network, n_classes: int) -> EnergyModel:
        return TemperedEnergy(network, n_classes, self.temperature)


class Tempered(JEMVariant):
    energy: EnergyPart = TemperedReading()


@hookimpl
def jemkit_energy_models() -> Mapping[str, type[EnergyModelSpec]]:
    return {"tempered": TemperedReading}


@hookimpl
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    return {"tempered": Tempered}
