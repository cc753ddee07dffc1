"""log p(x): negatives from chains that a replay buffer keeps, and their loss (Eqs. 2, 9)."""

import math
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Generator, Tensor

from jemkit.data import Bounds
from jemkit.errors import ConfigError, MisfitError
from jemkit.models.energy import EnergyModel, ModelEnergy
from jemkit.options import Options
from jemkit.runtime import distributed
from jemkit.runtime.disk import readable
from jemkit.runtime.modes import BatchNormMode, batch_norms, sampling_mode
from jemkit.sampling.init_dists import Start
from jemkit.sampling.kernels import Boxed, Sampler, run

LEAST = 64  # minimum number of chains that run together if batch norm couples them


@runtime_checkable
class Density(Protocol):
    """How p(x) is sampled and learnt."""

    sampler: Sampler
    start: Start
    steps: int

    def draw(self, model: EnergyModel, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        """x_neg [n, ...] from p(x), or from p(x | y); uses and updates the buffer."""

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
        """x [n, ...] from newly started chains; does not touch the buffer.

        A chain's result may depend on how many run, but not on a small last batch.
        """

    def loss(self, positive: Tensor, negative: Tensor) -> Tensor:
        """-log p(x) up to a constant, from energies of data [B] and of negatives [n] (Eq. 9)."""

    def mark(self) -> None:
        """Begin a step: save what `rollback` restores."""

    def rollback(self) -> None:
        """Undo every draw's effect on the buffer since `mark`."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Buffer(Options):
    """A replay buffer's options."""

    capacity: int = Field(10_000, ge=1)  # images that it keeps
    restart: float = Field(0.05, ge=0, le=1)  # share of chains that begin afresh
    conditional: bool = False  # one equal slice of slots for each class

    def check_classes(self, n_classes: int) -> None:
        """ConfigError if the classes would not have equal slices."""
        if self.conditional and self.capacity % n_classes:
            raise ConfigError(
                f"a class-conditional buffer of {self.capacity} slots cannot be shared evenly "
                f"by {n_classes} classes; set backbone.buffer.capacity to a multiple of {n_classes}"
            )

    def check_memory(self, shape: tuple[int, int, int], memory: int) -> None:
        """ConfigError for more states [C, H, W] than a device of so many bytes could hold."""
        needed = 4 * self.capacity * math.prod(shape)
        if needed > memory:
            most = memory // (4 * math.prod(shape))
            raise ConfigError(
                f"backbone.buffer.capacity = {self.capacity} takes {readable(needed)} for states "
                f"of {' x '.join(map(str, shape))}, and the device has {readable(memory)} of "
                f"memory in all: set it well below {most}"
            )


class ReplayBuffer:
    """The ends of earlier chains, from which most new chains begin; on the run's device.

    Slots are drawn without replacement, except where a batch has more images of a class than the
    class has slots. How many chains restart is the running sum of n * restart, rounded down: exact
    over many draws, and known without waiting for the device. Rows of a draw have no order, so the
    first ones restart.
    """

    def __init__(
        self, options: Buffer, start: Start, n_classes: int, rng: Generator, *, fill: bool = True
    ) -> None:
        self.options, self.start, self.n_classes = options, start, n_classes
        options.check_classes(n_classes)
        self._rng = rng
        if fill:
            self.states = self._filled()
        self.chains_begun = 0  # chains begun so far
        self._undo: list[tuple[Tensor, Tensor]] | None = None
        self._chains_at_mark = 0

    @cached_property
    def states(self) -> Tensor:
        """[capacity, C, H, W]; a buffer that is not filled yet is filled from its start."""
        return self._filled()

    def _filled(self) -> Tensor:
        slots = torch.arange(self.options.capacity, device=self._rng.device)
        y = slots * self.n_classes // self.options.capacity
        return self.start.draw(self.options.capacity, self._rng, y)

    def load(self, states: Tensor) -> None:
        """Take saved states [capacity, C, H, W]; MisfitError if these have another shape."""
        filled, capacity = "states" in vars(self), self.options.capacity
        room = [*self.states.shape] if filled else [capacity, *states.shape[1:]]
        if [*states.shape] != room:
            raise MisfitError(f"a buffer of {[*states.shape]} does not fit one of {room}")
        if states.dtype != torch.float32:
            raise MisfitError(f"a buffer of {states.dtype} does not fit one of {torch.float32}")
        if filled:
            self.states.copy_(states)
        else:
            self.states = states.to(self._rng.device, copy=True)

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States [n, C, H, W] to go on from, and the slots [n] that they belong to."""
        slots = self.slots(n, rng, y)
        restarts = self._restarts(n)
        x = self.states[slots]
        if restarts:
            x[:restarts] = self.start.draw(restarts, rng, None if y is None else y[:restarts])
        return x, slots

    def slots(self, n: int, rng: Generator, y: Tensor | None) -> Tensor:
        """Indices [n] of slots, which differ; with classes y [n], of the slots of each class.

        A class with more rows than slots repeats them. Raises ConfigError if there are fewer slots
        than n, and MisfitError for classes if the buffer is not class-conditional.
        """
        capacity = self.options.capacity
        if y is None:
            if n > capacity:
                raise ConfigError(f"{n} chains from a buffer of {capacity}: raise buffer.capacity")
            return torch.randperm(capacity, generator=rng, device=rng.device)[:n]
        if not self.options.conditional:
            raise MisfitError(
                "chains of given classes need a class-conditional buffer: "
                "set backbone.buffer.conditional = true"
            )
        size = capacity // self.n_classes
        order = torch.rand((self.n_classes, size), generator=rng, device=rng.device).argsort(dim=1)
        earlier = (y[:, None] == y).tril(-1).sum(dim=1)  # rows of the same class before each
        return y * size + order[y, earlier % size]

    def store(self, slots: Tensor, x: Tensor) -> None:
        """Write the ends of chains, x [n, C, H, W], to the slots [n] that `draw` gave."""
        if self._undo is not None:
            self._undo.append((slots, self.states[slots]))
        self.states[slots] = x

    def mark(self) -> None:
        self._undo, self._chains_at_mark = [], self.chains_begun

    def rollback(self) -> None:
        for slots, states in reversed(self._undo or []):
            self.states[slots] = states
        self._undo, self.chains_begun = None, self._chains_at_mark

    def _restarts(self, n: int) -> int:
        before, self.chains_begun = self.chains_begun, self.chains_begun + n
        return int(self.chains_begun * self.options.restart) - int(before * self.options.restart)


class ContrastiveDensity:
    """Persistent chains from a replay buffer, with the difference of mean energies as loss (Eqs. 2,
    9)."""

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
        with sampling_mode(model, self.options.batch_norm):
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
        x, mode = start.draw(among, rng, y), self.options.batch_norm
        # Training alone moves running statistics, also where its chains do.
        with sampling_mode(model, "batch_stats" if mode == "released" else mode):
            return self._run(model, x, rng, steps, y)[:n]

    def together(self, model: EnergyModel, n: int) -> int:
        """How many new chains run to obtain n; additional ones only serve batch norm."""
        coupled = batch_norms(model) and self.options.batch_norm != "running_stats"
        return max(n, LEAST) if coupled else n

    def _run(
        self, model: EnergyModel, x: Tensor, rng: Generator, steps: int, y: Tensor | None
    ) -> Tensor:
        kernel = Boxed(self.sampler, self.bounds) if self.options.box else self.sampler
        return run(kernel, ModelEnergy(model, y), x, rng, steps)

    def loss(self, positive: Tensor, negative: Tensor) -> Tensor:
        """mean E(x+) - mean E(x-), plus the penalty if there is one."""
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
        """Set the weight of the energy penalty to at least this."""
        weight = max(weight, self.options.penalty)
        self.options = self.options.model_copy(update={"penalty": weight})

    def mark(self) -> None:
        self.buffer.mark()

    def rollback(self) -> None:
        self.buffer.rollback()

    def state_dict(self) -> dict[str, Any]:
        return {"states": self.buffer.states, "drawn": self.buffer.chains_begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states, count = state.get("states"), state.get("drawn")
        if not isinstance(states, Tensor):
            raise MisfitError(
                f"the states of a buffer must be a tensor, not a {type(states).__name__}"
            )
        if type(count) is not int or count < 0:
            raise MisfitError(f"a buffer that {count!r} chains were begun from; expected a count")
        self.buffer.load(states)
        self.buffer.chains_begun = count


@runtime_checkable
class Buffered(Protocol):
    """A density with a replay buffer."""

    buffer: ReplayBuffer


@runtime_checkable
class Classwise(Protocol):
    """A density whose chains have classes also where none are given."""

    classwise: ClassVar[bool]


def together(density: Density, model: EnergyModel, sizes: list[int]) -> int:
    """The number of chains that run together in the largest batch, for a protocol."""
    if isinstance(density, ContrastiveDensity):
        return density.together(model, max(sizes))
    return max(sizes)


@runtime_checkable
class Penalised(Protocol):
    """A density that supports an energy penalty."""

    def penalise(self, weight: float) -> None:
        """Set the penalty to at least this weight; a density with a `penalty` above it is
        unchanged."""


def penalty_of(density: Density | None) -> float:
    """The current weight of a density's energy penalty."""
    return float(getattr(density, "penalty", 0.0))


@runtime_checkable
class DensitySpec(Protocol):
    """The options of a density; a registered part."""

    def build(
        self, sampler: Sampler, steps: int, start: Start, buffer: ReplayBuffer, bounds: Bounds
    ) -> Density: ...


class Contrastive(Options):
    """Contrastive divergence with persistent chains, the density of all JEM variants."""

    batch_norm: BatchNormMode = "batch_stats"  # how chains normalise
    box: bool = True  # clamp chains to the pixel range
    penalty: float = Field(0.0, ge=0)  # weight of the penalty on squared mean energies
    # means: both means are squared; positives: each E(x+), and the mean of E(x-)
    penalty_on: Literal["means", "positives"] = "means"

    def unused(self) -> dict[str, str]:
        return {} if self.penalty else {"penalty_on": "where penalty is 0"}

    def build(
        self, sampler: Sampler, steps: int, start: Start, buffer: ReplayBuffer, bounds: Bounds
    ) -> Density:
        return ContrastiveDensity(self, sampler, steps, start, buffer, bounds)
