"""Energy models: one forward pass gives a classifier and a density (Eqs. 1, 3)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jemkit.errors import MisfitError
from jemkit.options import Options
from jemkit.runtime.microbatch import microbatched

EnergyFn = Callable[[Tensor], Tensor]
"""E: images [B, ...] to energies [B]; low where an image is likely."""


class Scores(NamedTuple):
    """The result of one forward pass of a batch."""

    logits: Tensor  # [B, K], float32
    energy: Tensor  # [B], float32, E(x)

    def joint(self, y: Tensor) -> Tensor:
        """E(x, y) = E(x) - log p(y | x), [B]; for JEM this is -f(x)[y] (Eq. 3)."""
        return self.energy + F.cross_entropy(self.logits, y, reduction="none")

    def split(self, sizes: list[int]) -> list["Scores"]:
        """The scores of a joint pass, stream by stream."""
        pairs = zip(torch.split(self.logits, sizes), torch.split(self.energy, sizes), strict=True)
        return [Scores(*pair) for pair in pairs]


class Network(nn.Module, ABC):
    """Images to features; `trunk(stem(x))`, so that a sampler can evaluate the first layer
    alone."""

    width: int  # D
    has_stem: ClassVar[bool] = True  # False: `stem` is the identity, so PYLD cannot be used
    recomputes: ClassVar[bool] = False  # True: activation checkpointing, as `convolved` does it

    @abstractmethod
    def stem(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to the first layer's output."""

    @abstractmethod
    def trunk(self, h: Tensor) -> Tensor:
        """The first layer's output to features [B, D]."""

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to features [B, D]."""
        return self.trunk(self.stem(x))


class EnergyModel(nn.Module, ABC):
    """A classifier that is also a density: a network's features, mapped to scores."""

    network: Network
    beside_logits: str = ""  # what an attack on the K logits does not see, for a warning
    attacks_beside: tuple[str, ...] = ()  # names of the attacks that do see it

    @abstractmethod
    def read(self, features: Tensor) -> Scores:
        """Features [B, D], float32, to scores."""

    def forward(self, x: Tensor) -> Scores:
        """Images [B, C, H, W] to scores."""
        return self.scores(microbatched(self.network, x, self.network))

    def scores(self, features: Tensor) -> Scores:
        """`read` of features [B, D] in float32, also if the network runs in bfloat16.

        The rounding error of an energy in bfloat16 is larger than the gaps that training minimises.
        """
        wide = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return self.read(features.to(wide))

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Scores: ...


class LogSumExpEnergy(EnergyModel):
    """JEM's energy of a classifier: E(x) = -logsumexp f(x) (Eq. 1)."""

    def __init__(self, network: Network, n_classes: int) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.width, n_classes)

    def read(self, features: Tensor) -> Scores:
        logits = self.head(features)
        return Scores(logits, -logits.logsumexp(dim=1))


class LogitEnergy(EnergyModel):
    """Any module whose output is logits, with JEM's energy (Eq. 1)."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Scores:
        logits = microbatched(self.network, x, self.network)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise MisfitError(
                f"the model gives {came} for {len(x)} images; expected a tensor of logits, "
                f"[{len(x)}, classes]"
            )
        return self.scores(logits)

    def read(self, features: Tensor) -> Scores:
        return Scores(features, -features.logsumexp(dim=1))


class LinearEnergy(EnergyModel):
    """M-EBM's energy (Yang and Ji 2023): a separate linear head gives -E(x)."""

    beside_logits = (
        "E(x) has a head of its own, which attacks on the class logits do not see: what they leave "
        "says nothing of E(x) under attack"
    )
    attacks_beside = ("energy", "detector")

    def __init__(self, network: Network, n_classes: int) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.width, n_classes)
        self.energy = nn.Linear(network.width, 1)

    def read(self, features: Tensor) -> Scores:
        return Scores(self.head(features), -self.energy(features).squeeze(1))


@dataclass(frozen=True)
class ModelEnergy:
    """The EnergyFn of a model: E(x), or E(x, y) if labels are given."""

    model: EnergyModel
    y: Tensor | None = None  # [B]

    def __call__(self, x: Tensor) -> Tensor:
        return self._of(self.model(x))

    def stem(self, x: Tensor) -> Tensor:
        """The first layer's output of images [B, ...]."""
        network = self.model.network
        return microbatched(network.stem, x, network)

    def trunk(self, h: Tensor) -> Tensor:
        """The energy [B] as a function of the first layer's output [B, ...]."""
        network = self.model.network
        return self._of(self.model.scores(microbatched(network.trunk, h, network)))

    def _of(self, scores: Scores) -> Tensor:
        return scores.energy if self.y is None else scores.joint(self.y)


@runtime_checkable
class EnergyModelSpec(Protocol):
    """How features are mapped to scores; a registered part."""

    def build(self, network: Network, n_classes: int) -> EnergyModel: ...


class LogSumExp(Options):
    """E(x) = -logsumexp f(x), JEM's energy (Eq. 1)."""

    def build(self, network: Network, n_classes: int) -> EnergyModel:
        return LogSumExpEnergy(network, n_classes)


class LinearHead(Options):
    """E(x) from a linear head beside the classifier's, M-EBM's energy."""

    def build(self, network: Network, n_classes: int) -> EnergyModel:
        return LinearEnergy(network, n_classes)
