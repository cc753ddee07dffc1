"""The replay buffer: images that chains go on from."""

import math

import torch
from pydantic import Field
from torch import Generator, Tensor

from jemkit.errors import ConfigError, MisfitError
from jemkit.options import Options
from jemkit.runtime.disk import readable
from jemkit.runtime.lazy import Late
from jemkit.sampling.init_dists import Start


class Buffer(Options):
    """A replay buffer's options."""

    capacity: int = Field(10_000, ge=1)
    restart: float = Field(0.05, ge=0, le=1)  # share of chains that begin afresh
    conditional: bool = False  # one equal slice of slots for each class

    def check_classes(self, n_classes: int) -> None:
        """Refuse slices that would not be equal."""
        if self.conditional and self.capacity % n_classes:
            raise ConfigError(
                f"a class-conditional buffer of {self.capacity} slots cannot be shared evenly "
                f"by {n_classes} classes; set backbone.buffer.capacity to a multiple of {n_classes}"
            )

    def check_memory(self, shape: tuple[int, int, int], memory: int) -> None:
        """Refuse more states than a device of so many bytes could ever hold."""
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

    Slots are drawn without replacement, so that no chain's end is lost to another's. How many
    chains restart is the running sum of n * restart, rounded down: exact over many draws, and
    known without waiting for the device. Rows of a draw have no order, so the first ones restart.
    """

    def __init__(
        self, options: Buffer, start: Start, n_classes: int, rng: Generator, *, fill: bool = True
    ) -> None:
        self.options, self.start, self.n_classes = options, start, n_classes
        options.check_classes(n_classes)
        self._late = Late(lambda: self._filled(rng))
        self._device = rng.device
        if fill:
            self._late.get()
        self.drawn = 0  # chains begun so far
        self._undo: list[tuple[Tensor, Tensor]] | None = None
        self._drawn_at_mark = 0

    @property
    def states(self) -> Tensor:
        """[capacity, C, H, W]; a buffer that is not filled yet is filled from its start."""
        return self._late.get()

    @states.setter
    def states(self, states: Tensor) -> None:
        self._late.set(states)

    def _filled(self, rng: Generator) -> Tensor:
        slots = torch.arange(self.options.capacity, device=rng.device)
        y = slots * self.n_classes // self.options.capacity
        return self.start.draw(self.options.capacity, rng, y)

    def load(self, states: Tensor) -> None:
        """Take saved states; nothing is drawn for it."""
        filled, capacity = self._late.made, self.options.capacity
        room = [*self.states.shape] if filled else [capacity, *states.shape[1:]]
        if [*states.shape] != room:
            raise MisfitError(f"a buffer of {[*states.shape]} does not fit one of {room}")
        if states.dtype != torch.float32:
            raise MisfitError(f"a buffer of {states.dtype} does not fit one of {torch.float32}")
        if filled:
            self.states.copy_(states)
        else:
            self.states = states.to(self._device, copy=True)

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """n states to go on from, and the slots that they belong to."""
        slots = self.slots(n, rng, y)
        restarts = self._restarts(n)
        x = self.states[slots]
        if restarts:
            x[:restarts] = self.start.draw(restarts, rng, None if y is None else y[:restarts])
        return x, slots

    def slots(self, n: int, rng: Generator, y: Tensor | None) -> Tensor:
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
        if self._undo is not None:
            self._undo.append((slots, self.states[slots]))
        self.states[slots] = x

    def mark(self) -> None:
        self._undo, self._drawn_at_mark = [], self.drawn

    def rollback(self) -> None:
        for slots, states in reversed(self._undo or []):
            self.states[slots] = states
        self._undo, self.drawn = None, self._drawn_at_mark

    def _restarts(self, n: int) -> int:
        before, self.drawn = self.drawn, self.drawn + n
        return int(self.drawn * self.options.restart) - int(before * self.options.restart)
