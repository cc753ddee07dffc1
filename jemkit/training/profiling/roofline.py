"""The roofline of a training step: its FLOPs and memory traffic at the machine's measured rates."""

from typing import Any, NamedTuple

from jemkit.config.recipe import Recipe, Resolved
from jemkit.data import Batch, positives
from jemkit.runtime.precision import numerics
from jemkit.runtime.run_dir import versions
from jemkit.runtime.timing import PATIENCE
from jemkit.step import train_step
from jemkit.training.build import RunState
from jemkit.training.profiling.flops import Passes, StepWork, flops, passes, step_work, traffic
from jemkit.training.profiling.machine import Machine, measured, seconds, typical
from jemkit.updaters import Guard


def protocol(resolved: Resolved, parts: RunState, rounds: int) -> dict[str, Any]:
    """What a roofline was measured on."""
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


class Roofline(NamedTuple):
    """The FLOPs of a step, the time they need on this machine, and the time a step took."""

    machine: Machine
    step: StepWork
    passes: Passes  # of the classifier's batch
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
        forward, to_input, to_weights = map(flops, self.passes)
        return {
            **self.machine._asdict(),
            "flops_forward": forward,
            "flops_to_input": to_input,
            "flops_to_weights": to_weights,
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
        taken = _step_time(parts, recipe, batch, rounds) if rounds else None
        model_passes = passes(parts.backbone.model, batch.x)
    return Roofline(machine, step, model_passes, arithmetic, memory, taken)


def rows(roofline: Roofline) -> list[list[str]]:
    """The figures as a table."""
    machine, step = roofline.machine, roofline.step
    parts = dict(zip(("forward", "to the input", "to the weights"), roofline.passes, strict=True))
    lines = [["device", f"{machine.device}, {machine.threads} threads"]]
    lines += [[f"a batch, {name}", _giga(flops(work), "FLOP")] for name, work in parts.items()]
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


def _step_time(parts: RunState, recipe: Recipe, batch: Batch, rounds: int) -> float:
    guard = Guard()

    def one() -> None:
        train_step(
            parts.backbone, parts.objective, parts.updater, batch, parts.rng, guard,
            recipe.run.theta_steps,
        )  # fmt: skip

    seconds = typical(one, parts.device, rounds)
    guard.settle()
    return seconds
