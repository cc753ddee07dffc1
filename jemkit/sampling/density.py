"""log p(x): drawing negatives from the model, and the contrastive loss on them (Eqs. 2, 9)."""

from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Generator, Tensor

from jemkit.data import Bounds
from jemkit.errors import MisfitError
from jemkit.models.energy import EnergyModel, ModelEnergy
from jemkit.options import Options
from jemkit.runtime import distributed
from jemkit.runtime.modes import BatchNormMode, batch_norms, sampling_mode
from jemkit.sampling.init_dists import Start
from jemkit.sampling.kernels import Boxed, Sampler, run
from jemkit.sampling.replay_buffer import ReplayBuffer

LEAST = 64
"""Chains that run together at the least where batch norm normalises each by the others."""


TOGETHER = 500
"""Chains that run together at the most, where images are drawn to be looked at or judged."""


def even_batches(n: int, most: int) -> list[int]:
    """n chains in as few batches of at most `most` as it takes, none smaller by more than one.

    A rest by itself would be normalised by itself.
    """
    batches = -(-n // most)
    return [n // batches + (i < n % batches) for i in range(batches)]


def portions(n: int) -> dict[str, int]:
    """n chains in even batches of at most TOGETHER: how many, by a name for each batch."""
    return {f"{i:05d}-{size}": size for i, size in enumerate(even_batches(n, TOGETHER))}


@runtime_checkable
class Density(Protocol):
    """How p(x) is drawn and learnt."""

    sampler: Sampler
    start: Start
    steps: int

    def draw(self, model: EnergyModel, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        """x_neg [n, ...] of p(x), or of p(x | y); uses and updates the buffer."""
        ...

    def sample(
        self,
        model: EnergyModel,
        n: int,
        rng: Generator,
        *,
        steps: int,
        start: Start,
        y: Tensor | None = None,
    ) -> Tensor:
        """x [n, ...] from fresh chains; never touches the buffer.

        What becomes of one chain may depend on how many run, but not on there being few.
        """
        ...

    def loss(self, positive: Tensor, negative: Tensor) -> Tensor:
        """-log p(x) up to a constant, from energies of data [B] and of negatives [n] (Eq. 9)."""
        ...

    def mark(self) -> None:
        """Begin a step: remember what `rollback` would have to undo."""
        ...

    def rollback(self) -> None:
        """Undo every draw's effect on the buffer since `mark`."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ContrastiveDensity:
    """Persistent chains from a replay buffer, and the difference of mean energies (Eqs. 2, 9)."""

    deals: ClassVar[dict[str, str]] = {"states": "slots", "drawn": "count"}

    def __init__(
        self,
        options: "Contrastive",
        sampler: Sampler,
        steps: int,
        start: Start,
        buffer: ReplayBuffer,
        bounds: Bounds,
    ) -> None:
        self.options, self.sampler, self.steps = options, sampler, steps
        self.start, self.buffer, self.bounds = start, buffer, bounds

    def draw(self, model: EnergyModel, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        """Algorithm 1, lines 6-9; 'random noise' of line 7 is the buffer, as in all JEMs."""
        x, slots = self.buffer.draw(n, rng, y)
        x = self._run(model, x, rng, self.steps, y)
        self.buffer.store(slots, x)
        return x

    def sample(
        self,
        model: EnergyModel,
        n: int,
        rng: Generator,
        *,
        steps: int,
        start: Start,
        y: Tensor | None = None,
    ) -> Tensor:
        among = self.together(model, n)
        if y is not None:
            y = y[torch.arange(among, device=y.device) % n]
        return self._run(model, start.draw(among, rng, y), rng, steps, y)[:n]

    def together(self, model: EnergyModel, n: int) -> int:
        """How many fresh chains run for n of them: those beyond are there for batch norm alone."""
        coupled = batch_norms(model) and self.options.batch_norm != "running_stats"
        return max(n, LEAST) if coupled else n

    def _run(
        self, model: EnergyModel, x: Tensor, rng: Generator, steps: int, y: Tensor | None
    ) -> Tensor:
        kernel = Boxed(self.sampler, self.bounds) if self.options.box else self.sampler
        with sampling_mode(model, self.options.batch_norm):
            return run(kernel, ModelEnergy(model, y), x, rng, steps)

    def loss(self, positive: Tensor, negative: Tensor) -> Tensor:
        """mean E(x+) - mean E(x-), and the penalty where there is one."""
        gap = positive.mean() - negative.mean()
        if not self.options.penalty:
            return gap
        return gap + self.options.penalty * self._size(positive, negative)

    def _size(self, positive: Tensor, negative: Tensor) -> Tensor:
        if self.options.penalty_on == "means":  # SADA-JEM
            return distributed.mean(positive).square() + distributed.mean(negative).square()
        return positive.square().mean() + distributed.mean(negative).square()  # M-EBM

    @property
    def penalty(self) -> float:
        return self.options.penalty

    def penalise(self, weight: float) -> None:
        """Hold the size of the energies down by at least this much."""
        weight = max(weight, self.options.penalty)
        self.options = self.options.model_copy(update={"penalty": weight})

    def mark(self) -> None:
        self.buffer.mark()

    def rollback(self) -> None:
        self.buffer.rollback()

    def state_dict(self) -> dict[str, Any]:
        return {"states": self.buffer.states, "drawn": self.buffer.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states, drawn = state.get("states"), state.get("drawn")
        if not isinstance(states, Tensor):
            raise MisfitError(f"a buffer's states are a tensor, not a {type(states).__name__}")
        if type(drawn) is not int or drawn < 0:
            raise MisfitError(f"a buffer that {drawn!r} chains were begun from; expected a count")
        self.buffer.load(states)
        self.buffer.drawn = drawn


@runtime_checkable
class Buffered(Protocol):
    """A density that keeps a replay buffer."""

    buffer: ReplayBuffer


def together(density: Density, model: EnergyModel, sizes: list[int]) -> int:
    """The chains that run side by side in the largest of these batches, for a protocol."""
    if isinstance(density, ContrastiveDensity):
        return density.together(model, max(sizes))
    return max(sizes)


@runtime_checkable
class Penalised(Protocol):
    """A density that can hold the size of the energies down."""

    def penalise(self, weight: float) -> None:
        """By at least this much; one that says its present `penalty` is spared a lighter one."""
        ...


def penalty_of(density: Density | None) -> float:
    """The weight that a density says it holds the energies down by."""
    return float(getattr(density, "penalty", 0.0))


@runtime_checkable
class DensitySpec(Protocol):
    """How a density is put together; a registered part."""

    def build(
        self, sampler: Sampler, steps: int, start: Start, buffer: ReplayBuffer, bounds: Bounds
    ) -> Density: ...


class Contrastive(Options):
    """Contrastive divergence with persistent chains, the density of every JEM."""

    batch_norm: BatchNormMode = "batch_stats"
    box: bool = True  # keep chains in the pixel range
    penalty: float = Field(0.0, ge=0)  # on the size of the energies
    penalty_on: Literal["means", "positives"] = "means"

    def unused(self) -> dict[str, str]:
        return {} if self.penalty else {"penalty_on": "where penalty is 0"}

    def build(
        self, sampler: Sampler, steps: int, start: Start, buffer: ReplayBuffer, bounds: Bounds
    ) -> Density:
        return ContrastiveDensity(self, sampler, steps, start, buffer, bounds)
