"""Chains replayed: one step recorded as a CUDA graph, then launched whole, step after step."""

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass, replace
from types import CellType, FunctionType
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from jemkit.energy import EnergyFn
from jemkit.memory import cuts
from jemkit.options import Options
from jemkit.runtime import distributed
from jemkit.sampling import Sampler, eager_run

LIMIT = 8
"""How many recordings are kept: each holds the memory of one step."""


class Unfit(Exception):
    """A chain that cannot be recorded, and why."""


class Recorder(Protocol):
    """What records a step and plays it again."""

    def aside(self) -> AbstractContextManager[None]:
        """Where a step runs before it is recorded, so that libraries have set themselves up."""
        ...

    def record(self, step: Callable[[], None], rng: Generator) -> Callable[[], None]:
        """The step as it can be played again, drawing on from wherever `rng` then stands."""
        ...


class CudaGraphs:
    """CUDA graphs, all captured on one stream of their own."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @contextmanager
    def aside(self) -> Iterator[None]:
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            here.wait_stream(self._stream)

    def record(self, step: Callable[[], None], rng: Generator) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(rng)
        here = torch.cuda.stream(torch.cuda.current_stream())  # a failed capture does not go back
        # thread_local: the writer of checkpoints may allocate meanwhile
        with here, torch.cuda.graph(
            graph, stream=self._stream, capture_error_mode="thread_local"
        ):  # fmt: skip
            step()
        return graph.replay


class Replay:
    """`sampling.run` by recorded steps; the numbers are the eager chain's, noise included.

    A step is recorded when its kind of chain comes a second time: the first one runs as ever and
    warms up. Of one kind are chains whose kernel, energy, shapes, modes, generator and autocast
    are the same. Tensors that kernel and energy hold, such as a ball's centre or labels, are
    inputs and copied in each time; weights are read where they lie, so that updates in place are
    seen, and weights that lie elsewhere make another kind. Weights must be frozen: autocast then
    keeps no cast of them. torch's other switches must not change while one Replay is used, and
    hooks on the network are run while recording alone.

    A chain that cannot be recorded runs eagerly: one whose energy holds what nobody here knows to
    be constant, or whose step waits for the device. The first such is told by a warning.
    """

    def __init__(self, recorder: Recorder, limit: int = LIMIT) -> None:
        self.recorder, self.limit = recorder, limit
        self.recorded = 0  # how many steps were recorded so far
        self.given_up = self._told = False
        self._kept: dict[Hashable, _Recording] = {}  # the one used last at the end

    def __call__(
        self, sampler: Sampler, energy: EnergyFn, x: Tensor, rng: Generator, steps: int
    ) -> Tensor:
        if cuts(len(x)):  # memory ran out: what is kept for chains that are now cut is in the way
            self._kept = {k: r for k, r in self._kept.items() if len(r.inputs[0]) != len(x)}
            return eager_run(sampler, energy, x, rng, steps)
        if self.given_up or not steps:
            return eager_run(sampler, energy, x, rng, steps)
        inputs = [x]
        try:
            form = (_looks(x), *(constant(part, inputs) for part in (sampler, energy)))
            kind = (form, id(rng), _autocast(x.device.type))
            kept = self._kept.pop(kind, None) or _Recording(sampler, energy, inputs, rng)
        except (Unfit, TypeError, ValueError, RecursionError) as error:
            # options that cannot be hashed, functions that are not whole yet or hold themselves
            self._tell(error)
            return eager_run(sampler, energy, x, rng, steps)
        self._kept[kind] = kept
        while len(self._kept) > self.limit:
            del self._kept[next(iter(self._kept))]
        kept.take(inputs)
        if not kept.warm:
            with self.recorder.aside():
                return kept.run(kept.step, steps)
        if kept.again is None:
            kept.again = self._record(kept, rng)
        return kept.run(kept.step if kept.again is None else kept.again, steps)

    def _record(self, kept: "_Recording", rng: Generator) -> Callable[[], None] | None:
        before = rng.get_state()
        try:
            found = self.recorder.record(kept.step, rng)
        except RuntimeError as error:
            self.given_up = True
            rng.set_state(before)
            self._tell(error)
            return None
        self.recorded += 1
        return found

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            what = " ".join(str(error).split())
            warnings.warn(f"chains run without a CUDA graph: {what}", stacklevel=4)


def replay_on(device: torch.device) -> Replay | None:
    """What replays the chains of a run: CUDA graphs, where one process is alone on a GPU."""
    alone = device.type == "cuda" and distributed.shard().size == 1
    return Replay(CudaGraphs()) if alone else None


class _Recording:
    """One kind of chain: tensors that stay where they are, and a step that moves the first.

    The step holds its model and generator, so that their ids do not come to mean others.
    """

    def __init__(
        self, sampler: Sampler, energy: EnergyFn, inputs: list[Tensor], rng: Generator
    ) -> None:
        self.inputs = [t.detach().clone() for t in inputs]
        self.warm, self.again = False, None  # type: bool, Callable[[], None] | None
        x, *held = self.inputs
        own = iter(held)
        kernel, fixed = refilled(sampler, own), refilled(energy, own)

        def step() -> None:
            x.copy_(kernel.step(fixed, x, rng).detach())

        self.step = step

    def take(self, inputs: list[Tensor]) -> None:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)

    def run(self, step: Callable[[], None], steps: int) -> Tensor:
        for _ in range(steps):
            step()
        self.warm = True
        return self.inputs[0].clone()


def constant(value: Any, inputs: list[Tensor]) -> Hashable:
    """What of a kernel or an energy a recording holds fixed; its tensors aside."""

    def each(values: Any) -> Hashable:
        return tuple(constant(v, inputs) for v in values)

    if isinstance(value, Tensor):
        inputs.append(value)
        return _looks(value)
    if isinstance(value, nn.Module):
        return _lies(value)
    if isinstance(value, FunctionType):
        held = [*(value.__defaults__ or ()), *(cell.cell_contents for cell in _cells(value))]
        return (value.__module__, value.__code__, each(held))
    if is_dataclass(value) and not isinstance(value, type):
        if not all(f.init for f in fields(value)):
            raise Unfit(f"{type(value).__name__} has fields that are not given when it is made")
        return (type(value), each(getattr(value, f.name) for f in fields(value)))
    if isinstance(value, tuple | list):
        return (type(value), each(value))
    if value is None or isinstance(value, Options | str | int | float):
        hash(value)
        return (type(value), value)
    raise Unfit(f"its energy or kernel holds a {type(value).__name__}, which may change")


def refilled(value: Any, inputs: Iterator[Tensor]) -> Any:
    """The same kernel or energy with other tensors, in the order in which they were set aside."""
    if isinstance(value, Tensor):
        return next(inputs)
    if isinstance(value, FunctionType):
        defaults = tuple(refilled(v, inputs) for v in value.__defaults__ or ()) or None
        cells = tuple(CellType(refilled(c.cell_contents, inputs)) for c in _cells(value))
        return FunctionType(value.__code__, value.__globals__, value.__name__, defaults, cells)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: refilled(getattr(value, f.name), inputs)
                                 for f in fields(value)})  # fmt: skip
    if isinstance(value, tuple | list):
        items = [refilled(v, inputs) for v in value]
        return type(value)(items) if type(value) in (tuple, list) else type(value)(*items)
    return value


def _cells(function: FunctionType) -> tuple[CellType, ...]:
    if function.__kwdefaults__:
        raise Unfit(f"{function.__qualname__} has defaults of keyword-only arguments")
    return function.__closure__ or ()


def _looks(t: Tensor) -> Hashable:
    return (tuple(t.shape), t.stride(), t.dtype, t.device)


def _lies(module: nn.Module) -> Hashable:
    """Which module, where its weights and buffers lie, and in which modes it is."""
    if any(p.requires_grad for p in module.parameters()):
        raise Unfit("its weights are not frozen")
    places = tuple(t.data_ptr() for t in (*module.parameters(), *module.buffers()))
    modes = ((m.training, getattr(m, "track_running_stats", None)) for m in module.modules())
    return (id(module), places, tuple(modes))


def _autocast(device_type: str) -> Hashable:
    return (torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
