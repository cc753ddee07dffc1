"""An energy model with a dummy class beside each class, folded to K logits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from jemkit import EnergyModel, EnergyModelSpec, MisfitError, Network, Options, Scores, hookimpl

Fold = Literal["lse", "max"]
"""How f[c] and f[c + K] are combined to the logit of class c."""


class Dummies(Options):
    """2K logits, of class c and its dummy c + K, folded to K; E(x) is computed from all 2K."""

    fold: Fold = "lse"  # how the logits of a class and its dummy become one

    def build(self, network: Network, n_classes: int) -> EnergyModel:
        return DummyEnergy(network, n_classes, self.fold)


class DummyEnergy(EnergyModel):
    """A head of 2K logits that returns folded logits; with "none" it returns all of them."""

    def __init__(self, network: Network, n_classes: int, fold: Fold) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.width, 2 * n_classes)
        self.fold: Fold | Literal["none"] = fold

    @property
    def beside_logits(self) -> str:  # type: ignore[override]
        return (
            f"the model has 2K logits, and attacks see K, folded by {self.fold}: the evaluator "
            "foldings attacks through both foldings"
        )

    def read(self, features: Tensor) -> Scores:
        raw = self.head(features)
        return Scores(raw if self.fold == "none" else folded(raw, self.fold), -raw.logsumexp(1))


def folded(raw: Tensor, fold: Fold = "lse") -> Tensor:
    """Fold logits [B, 2K] to [B, K]; raises MisfitError if their number is odd."""
    if raw.shape[1] % 2:
        raise MisfitError(
            f"{raw.shape[1]} logits cannot be folded: expected an even number, one of each class "
            "and of its dummy"
        )
    pairs: Tensor = raw.view(len(raw), 2, -1)
    return pairs.logsumexp(1) if fold == "lse" else pairs.amax(1)


def with_dummies(model: EnergyModel) -> DummyEnergy:
    """The model's energy with dummies; raises MisfitError if it has no dummy classes."""
    if not isinstance(model, DummyEnergy):
        raise MisfitError(
            "the objective ducat needs a dummy class for each class: set "
            'backbone.energy.use = "dummies"'
        )
    return model


@contextmanager
def read_as(model: EnergyModel, fold: Fold | Literal["none"]) -> Iterator[None]:
    """Use another folding of the model inside the block."""
    folded = with_dummies(model)
    before, folded.fold = folded.fold, fold
    try:
        yield
    finally:
        folded.fold = before


@hookimpl
def jemkit_energy_models() -> Mapping[str, type[EnergyModelSpec]]:
    return {"dummies": Dummies}
