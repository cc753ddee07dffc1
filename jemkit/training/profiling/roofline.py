"""The roofline of a training step: its FLOPs and memory traffic at the machine's measured rates."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator

from jemkit.config.recipe import Recipe, Resolved
from jemkit.data import positives
from jemkit.runtime.precision import numerics
from jemkit.runtime.run_dir import versions
from jemkit.runtime.timing import PATIENCE, Clock, elapsed, fastest
from jemkit.step import train_step
from jemkit.training.build import RunState
from jemkit.training.profiling.flops import Operation, StepWork, Work, flops, step_work, traffic
from jemkit.updaters import Guard


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


def seconds(
    work: Work, device: torch.device, patience: float = PATIENCE, clock: Clock = time.perf_counter
) -> dict[Operation, float]:
    """The fastest time of one call of each operation, at its own shapes."""
    rng = Generator(device).manual_seed(0)
    with torch.no_grad():
        return {op: fastest(op.call(rng), device, patience, clock) for op in work}


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
            "updates": self.step.updates,
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


def rows(roofline: Roofline) -> list[list[str]]:
    machine, step = roofline.machine, roofline.step
    lines = [["device", f"{machine.device}, {machine.threads} threads"]]
    lines += [
        ["chains of a step", _giga(flops(step.draw), "FLOP")],
        [f"update, taken {step.updates} x", _giga(flops(step.update), "FLOP")],
        ["whole step", _giga(flops(step.whole), "FLOP")],
        ["its traffic", _giga(traffic(step.whole), "B")],
        ["rate of a large product", _giga(machine.matmul, "FLOP/s")],
        ["rate at the step's shapes", _giga(roofline.rate, "FLOP/s")],
        ["bandwidth of a copy", _giga(machine.bandwidth, "B/s")],
        ["compute bound", f"{1e3 * roofline.arithmetic:.1f} ms"],
        ["memory bound", f"{1e3 * roofline.memory:.1f} ms"],
    ]
    if roofline.taken is not None:
        lines.append(["the step took", f"{1e3 * roofline.taken:.1f} ms"])
    return lines


def _giga(value: float, unit: str) -> str:
    return f"{value / 1e9:.3g} G{unit}"
