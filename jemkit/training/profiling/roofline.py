"""The roofline of a training step: its FLOPs and memory traffic at the machine's measured rates.

Every operation for which torch has a FLOP formula is recorded with its shapes, and timed alone.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from jemkit.backbone import Backbone
from jemkit.config.recipe import Recipe, Resolved
from jemkit.data import Batch, positives
from jemkit.objective import Objective, Terms
from jemkit.runtime.modes import frozen_batch_stats
from jemkit.runtime.precision import numerics
from jemkit.runtime.run_dir import versions
from jemkit.runtime.timing import PATIENCE, elapsed, fastest
from jemkit.step import train_step
from jemkit.training.build import RunState
from jemkit.updaters import Guard, UpdaterSpec


@dataclass(frozen=True)
class Like:
    """A tensor's shape, dtype and layout: all that the cost of an operation depends on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> "Like":
        return cls(tuple(t.shape), tuple(t.stride()), t.dtype)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self, rng: Generator) -> Tensor:
        t = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=rng.device)
        return t.normal_(generator=rng) if self.dtype.is_floating_point else t.zero_()


class Operation(NamedTuple):
    """One call that does FLOPs; equal calls compare equal, so that they can be counted."""

    name: str  # such as aten.convolution.default
    arguments: tuple[Any, ...]  # tensors as Like, lists as tuples
    flops: int
    bytes: int  # read and written, each operand once

    @property
    def function(self) -> Callable[..., Any]:
        operator: Any = torch.ops
        for part in self.name.split("."):
            operator = getattr(operator, part)
        return operator  # type: ignore[no-any-return]

    def call(self, rng: Generator) -> Callable[[], Any]:
        """The operation on noise, for timing."""
        filled = tree_map(lambda v: v.tensor(rng) if isinstance(v, Like) else v, self.arguments)
        function = self.function
        return lambda: function(*filled)


Work = Counter[Operation]
"""How often each operation is called."""


def flops(work: Work) -> int:
    return sum(operation.flops * calls for operation, calls in work.items())


def traffic(work: Work) -> int:
    """Bytes that the operations read and write, as if everything between them were fused."""
    return sum(operation.bytes * calls for operation, calls in work.items())


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation for which torch's flop counter has a formula."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: Work = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            tensors = [t for t in tree_flatten((args, out))[0] if isinstance(t, Tensor)]
            operation = Operation(
                str(func),
                _hashable(tree_map(lambda v: Like.of(v) if isinstance(v, Tensor) else v, args)),
                int(formula(*args, **(kwargs or {}), out_val=out)),
                sum(Like.of(t).bytes for t in tensors),
            )
            self.work[operation] += 1
        return out


@contextmanager
def counted() -> Iterator[Work]:
    """The operations inside the block."""
    with Recorder() as recorder:
        yield recorder.work


class StepWork(NamedTuple):
    """The FLOPs of a training step."""

    draw: Work  # of its chains
    update: Work
    evaluations: int  # of the loss, in the update: 1 for plain descent, 2 under SAM

    @property
    def whole(self) -> Work:
        return self.draw + self.update


def step_work(
    backbone: Backbone,
    objective: Objective[Any],
    updater: UpdaterSpec,
    batch: Batch,
    theta_steps: int = 1,
) -> StepWork:
    """A step's FLOPs, counted while one is computed; buffer, weights and statistics stay."""
    model, density = backbone.model, backbone.density_or_none
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    evaluations = 0

    def terms() -> Terms:
        nonlocal evaluations
        evaluations += 1
        return objective.loss(backbone, batch, draws)

    if density is not None:
        density.mark()
    try:
        with counted() as draw:
            draws = objective.draw(backbone, batch, Generator(batch.x.device).manual_seed(0))
        with counted() as update, frozen_batch_stats(model):
            updater.build(model, still).step(terms, Guard())
    finally:
        model.zero_grad()
        if density is not None:
            density.rollback()
    times = Counter({operation: theta_steps * n for operation, n in update.items()})
    return StepWork(draw, times, theta_steps * evaluations)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def protocol(resolved: Resolved, parts: RunState, rounds: int) -> dict[str, Any]:
    tables, run = resolved.tables, resolved.recipe.run
    return {
        "step": f"{tables['backbone']['use']} x {tables['objective']['use']}, "
        f"updater {tables['updater']['use']}",
        "network": tables["backbone"].get("network", {}),
        "images": f"{parts.loader.batch_size} of {tables['data']['use']}, {list(parts.task.shape)}",
        "positives": positives(parts.loader.batch_size, parts.backbone.views),
        "precision": run.precision,
        "channels_last": run.layout,
        "rounds": rounds,
        "seed": run.seed,
        "versions": versions(),
    }


SQUARE = {"cpu": 1024, "cuda": 8192}
LARGE = 2**26  # bytes, beyond any cache


class Machine(NamedTuple):
    """Measured rates of one device, with torch's current number of threads."""

    device: str
    threads: int
    matmul: float  # FLOP/s of a product of two square matrices
    bandwidth: float  # bytes/s of a copy, read and written


def measured(device: torch.device, patience: float = PATIENCE) -> Machine:
    matmul = product_rate(device, torch.float32, patience)
    source = torch.zeros(LARGE // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * LARGE / fastest(lambda: target.copy_(source), device, patience)
    return Machine(device.type, torch.get_num_threads(), matmul, bandwidth)


def product_rate(device: torch.device, dtype: torch.dtype, patience: float = PATIENCE) -> float:
    """FLOP/s of a product of two square matrices, large enough for the device."""
    n, rng = SQUARE[device.type], Generator(device).manual_seed(0)
    a, b = (torch.empty(n, n, device=device).normal_(generator=rng).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * n**3 / fastest(lambda: torch.mm(a, b, out=product), device, patience)


def seconds(work: Work, device: torch.device, patience: float = PATIENCE) -> dict[Operation, float]:
    """The fastest time of one call of each operation, at its own shapes."""
    rng = Generator(device).manual_seed(0)
    with torch.no_grad():
        return {op: fastest(op.call(rng), device, patience) for op in work}


def typical(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The median time of `rounds` calls, after one warm-up call."""
    call()
    return statistics.median(elapsed(call, device) for _ in range(rounds))


class Roofline(NamedTuple):
    """The FLOPs of a step, the time they need on this machine, and the time a step took."""

    machine: Machine
    step: StepWork
    arithmetic: float  # seconds: every convolution and matrix product alone, at its own shapes
    memory: float  # seconds: reading and writing their operands, at the speed of a copy
    taken: float | None  # seconds of a step; None if none was run

    @property
    def bound(self) -> float:
        """The larger of the two bounds."""
        return max(self.arithmetic, self.memory)

    @property
    def reached(self) -> float | None:
        """The roofline divided by the time taken: 1 for a step that does nothing else."""
        return None if self.taken is None else self.bound / self.taken

    @property
    def rate(self) -> float:
        """FLOP/s of the step's operations, one after another."""
        return flops(self.step.whole) / self.arithmetic

    def figures(self) -> dict[str, Any]:
        """Everything as numbers, for JSON."""
        return {
            **self.machine._asdict(),
            "flops_draw": flops(self.step.draw),
            "flops_update": flops(self.step.update),
            "updates": self.step.evaluations,
            "flops_step": flops(self.step.whole),
            "bytes_step": traffic(self.step.whole),
            "rate": self.rate,
            "floor_arithmetic_s": self.arithmetic,
            "floor_memory_s": self.memory,
            "step_s": self.taken,
            "reached": self.reached,
        }


def roofline_of(
    parts: RunState, recipe: Recipe, *, rounds: int = 3, patience: float = PATIENCE
) -> Roofline:
    """Count a step of newly built parts, measure the machine at its shapes, run `rounds` steps."""
    run = recipe.run
    with numerics(precision=run.precision, deterministic=run.deterministic, threads=run.threads):
        batch = parts.loader.batch()
        step = step_work(parts.backbone, parts.objective, recipe.updater, batch, run.theta_steps)
        machine = measured(parts.device, patience)
        each = seconds(step.whole, parts.device, patience)
        arithmetic = sum(each[operation] * calls for operation, calls in step.whole.items())
        memory = traffic(step.whole) / machine.bandwidth
        guard = Guard()

        def one() -> None:
            train_step(
                parts.backbone, parts.objective, parts.updater, batch, parts.rng, guard,
                run.theta_steps,
            )  # fmt: skip

        taken = typical(one, parts.device, rounds) if rounds else None
        guard.settle()
    return Roofline(machine, step, arithmetic, memory, taken)


ROWS = {
    "flops_draw": ("chains of a step", "FLOP"), "flops_update": ("update", "FLOP"),
    "flops_step": ("whole step", "FLOP"), "bytes_step": ("its traffic", "B"),
    "matmul": ("rate of a large product", "FLOP/s"), "rate": ("rate at its shapes", "FLOP/s"),
    "bandwidth": ("bandwidth of a copy", "B/s"),
}  # fmt: skip
"""The figures that are shown in 10^9, their names and units."""
TIMES = {
    "floor_arithmetic_s": "compute bound", "floor_memory_s": "memory bound",
    "step_s": "the step took",
}  # fmt: skip


def rows(roofline: Roofline) -> list[list[str]]:
    figures = roofline.figures()
    lines = [["device", f"{figures['device']}, {figures['threads']} threads"]]
    lines += [[name, f"{figures[key] / 1e9:.3g} G{unit}"] for key, (name, unit) in ROWS.items()]
    lines.append(["evaluations of the loss", str(figures["updates"])])
    known = {key: name for key, name in TIMES.items() if figures[key] is not None}
    return lines + [[name, f"{1e3 * figures[key]:.1f} ms"] for key, name in known.items()]
