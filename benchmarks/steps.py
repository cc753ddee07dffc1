"""A training step of jemkit against the released schedule, the bare passes, and its roofline.

    python benchmarks/steps.py                      SADA-JEM x EB-JDAT, wrn-16-2, 3 x 32 x 32, 64
    python benchmarks/steps.py --what parts         every backbone with every objective
    python benchmarks/steps.py --what scaling       in M, M_adv, batch, width and image size
    python benchmarks/steps.py --small              on toy models, as a smoke test

Each configuration runs in its own process, so that its peak of memory is its own. They take steps
alternately, so that other load on the machine affects all equally. Ratios are computed per round.
`cpu` is processor time, which depends less on other programs.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from allocator import hold_memory
from naive import Released
from tools import keep
from torch import Generator

from jemkit import Batch, Guard, Task, train_step
from jemkit.backbone import Backbone
from jemkit.config.registry import installed
from jemkit.data import Images
from jemkit.models.networks import WRN
from jemkit.runtime.fsdp import fusable
from jemkit.runtime.microbatch import MicroBatch
from jemkit.runtime.modes import eval_mode, sampling_mode
from jemkit.runtime.precision import numerics
from jemkit.runtime.timing import settle
from jemkit.sampling.compile import CompiledGradient
from jemkit.sampling.density import Buffer
from jemkit.sampling.init_dists import Uniform
from jemkit.training.build import laid_out
from jemkit.training.objective_contexts import compiled_chains, in_bf16
from jemkit.training.profiling.roofline import (
    flops,
    measured,
    product_rate,
    seconds,
    step_work,
    traffic,
)  # fmt: skip
from jemkit.updaters import SAM, Plain

REGISTRY = installed(third_party=False)
MAIN = "jemkit+cl+hold"
VARIANTS = {
    "cpu": (
        "jemkit", "jemkit+cl", MAIN, "jemkit+cl+compile", "jemkit+cl+recompute", "jemkit+cl+bf16"
    ),
    "cuda": (
        "jemkit+cl", "jemkit+cl+recompute", "jemkit+cl+compile", "jemkit+cl+bf16",
        "jemkit+cl+bf16+compile"
    ),
}  # fmt: skip
"""cl: channels last; hold: memory held; recompute: checkpointing; all else as run.NAME is."""
RIVALS = ("released", "bare")
EPOCHS, IMAGES = 100, 45_000  # of the forecast: CIFAR-10 without its validation split


def built(given: argparse.Namespace, *, channels_last: bool = False) -> tuple[Backbone, Batch]:
    """The backbone and a batch of noise, on the device."""
    device = torch.device(given.device)
    rng = Generator(device).manual_seed(0)
    n, p = given.batch, max(2, round(given.batch * given.pos_share))
    shape = (3, given.size, given.size)
    x = torch.rand((n, *shape), generator=rng, device=device) * 2 - 1
    y = torch.arange(n, device=device) % 10
    images = Images((x + 1).cpu() / 2, y.cpu())
    task = Task(shape, 10, 8.0, n, 100, lambda _: images, "noise")
    spec = REGISTRY["backbone"][given.backbone]
    options: dict[str, Any] = {"network": WRN(depth=given.depth, width=given.width)}
    if given.backbone != "classifier":
        buffer = Buffer(capacity=max(given.capacity, p))
        options |= {"steps": given.steps, "start": Uniform(), "buffer": buffer}
    backbone = spec(**options).build(task, rng)
    laid_out(backbone.model, "yes" if channels_last else "no", device)
    backbone.model.train()
    return backbone, Batch(x, y, x[:p], torch.arange(n, device=device))


def optimizer_of(backbone: Backbone, *, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        backbone.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=fused or None
    )


def objective_of(given: argparse.Namespace) -> Any:
    part = REGISTRY["objective"][given.objective]
    known = {"adv_steps": given.adv_steps} if "adv_steps" in part.model_fields else {}
    return part(**known)


def jemkit(given: argparse.Namespace, *variants: str) -> Callable[[], Any]:
    """`train_step` as the trainer calls it."""
    if "hold" in variants:
        hold_memory()
    backbone, batch = built(given, channels_last="cl" in variants)
    rng, guard = Generator(given.device).manual_seed(1), Guard()
    spec = Plain() if given.updater == "plain" else SAM(rho=2.0, adaptive=True)
    optimizer = optimizer_of(backbone, fused=fusable(list(backbone.model.parameters())))
    updater = spec.build(backbone.model, optimizer)
    objective = objective_of(given)
    if "compile" in variants:
        objective = compiled_chains(objective, CompiledGradient())
    if "bf16" in variants:
        objective = in_bf16(objective, batch.x.device.type)
    micro = MicroBatch(recompute="recompute" in variants)

    def step() -> None:
        with micro.active():
            train_step(backbone, objective, updater, batch, rng, guard)

    return step


def released(given: argparse.Namespace) -> Callable[[], Any]:
    backbone, batch = built(given)
    naive = Released(
        backbone.model,
        optimizer_of(backbone),
        backbone.density.start,
        Generator(given.device).manual_seed(1),
        steps=given.steps,
        adv_steps=given.adv_steps,
        capacity=given.capacity,
        rho=0.0 if given.updater == "plain" else 2.0,
    )
    return lambda: naive.step(batch.x, batch.y, batch.x_pos)


def bare(given: argparse.Namespace) -> Callable[[], Any]:
    """The gradients and updates alone, eager, and nothing around them."""
    backbone, batch = built(given)
    model, optimizer = backbone.model, optimizer_of(backbone)

    def gradient(x: torch.Tensor) -> None:
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(model(leaf).energy.sum(), leaf)

    def step() -> None:
        with sampling_mode(model, "batch_stats"):
            for _ in range(given.steps):
                gradient(batch.x_pos)
        with eval_mode(model):
            for _ in range(given.adv_steps):
                gradient(batch.x)
        for _ in range(1 if given.updater == "plain" else 2):
            optimizer.zero_grad()
            streams = (batch.x, batch.x_pos, batch.x_pos, batch.x)
            sum(model(x).energy.mean() for x in streams).backward()  # type: ignore[union-attr]
        optimizer.step()

    return step


def serve(given: argparse.Namespace) -> None:
    """Build, say so, and make one step for each line that comes; tell what it took.

    By the switches of a run in fp32: torch's own let a GPU's convolutions be tf32.
    """
    name, *variants = given.contestant.split("+")
    device = torch.device(given.device)
    makers = {"released": released, "bare": bare}
    step = makers[name](given) if name in makers else jemkit(given, *variants)
    print(json.dumps({"rss_mib": peak()}), flush=True)
    for _ in sys.stdin:
        with numerics(threads=given.threads):
            settle(device)
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            settle(device)
        figures = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        if device.type == "cuda":
            figures["gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps({**figures, "rss_mib": peak()}), flush=True)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Contestant:
    """A process that steps when it is asked."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        command = [sys.executable, __file__, *arguments, "--contestant", name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.name, self.before = name, self._answer()["rss_mib"]
        self.times: list[dict[str, float]] = []

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.times.append(self._answer())

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}")
        figures: dict[str, float] = json.loads(line)
        return figures

    def close(self) -> None:
        self.process.communicate()

    def figures(self) -> dict[str, float]:
        timed = self.times[1:] or self.times  # the first one warms up
        totals = {
            f"{kind}_s": statistics.median(t[kind] for t in timed) for kind in ("wall", "cpu")
        }
        last = self.times[-1]
        totals |= {"peak_mib": last["rss_mib"], "step_mib": last["rss_mib"] - self.before}
        return totals | ({"gpu_mib": last["gpu_mib"]} if "gpu_mib" in last else {})


def compared(given: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """All contestants in turn; each one's time and memory against the first of jemkit's."""
    arguments = flags(given)
    contestants = [Contestant(name, arguments) for name in names]
    try:
        for _ in range(given.rounds + 1):
            for contestant in contestants:
                contestant.step()
    finally:
        for contestant in contestants:
            contestant.close()
    ratios = {
        f"{rival.name} / {ours.name}": {
            kind: statistics.median(
                a[kind] / b[kind]
                for a, b in zip(rival.times[1:], ours.times[1:], strict=True)
            )
            for kind in ("wall", "cpu")
        } | {"step_mib": rival.figures()["step_mib"] / max(ours.figures()["step_mib"], 1e-9)}
        for rival in contestants if rival.name in RIVALS
        for ours in contestants if ours.name not in RIVALS
    }  # fmt: skip
    return {
        "setting": {k: v for k, v in vars(given).items() if k not in ("contestant", "small")},
        "steps": {contestant.name: contestant.figures() for contestant in contestants},
        "ratios": ratios,
    }


def floor(given: argparse.Namespace, *, channels_last: bool) -> dict[str, float]:
    """The step's convolutions and products by themselves, one after another."""
    with numerics(threads=given.threads):
        return _floor(given, channels_last=channels_last)


def _floor(given: argparse.Namespace, *, channels_last: bool) -> dict[str, float]:
    device = torch.device(given.device)
    backbone, batch = built(given, channels_last=channels_last)
    spec = Plain() if given.updater == "plain" else SAM()
    work = step_work(backbone, objective_of(given), spec, batch).whole
    wall, cpu = (
        sum(each[operation] * calls for operation, calls in work.items())
        for each in (
            seconds(work, device, given.patience),
            seconds(work, device, given.patience, time.process_time),
        )
    )
    machine = measured(device, given.patience)
    return {
        "flops": flops(work), "bytes": traffic(work), "rate": flops(work) / wall,
        "floor_arithmetic_s": wall, "floor_arithmetic_cpu_s": cpu,
        "floor_memory_s": traffic(work) / machine.bandwidth,
        "matmul": machine.matmul, "bandwidth": machine.bandwidth,
        "matmul_bf16": product_rate(device, torch.bfloat16, given.patience),
    }  # fmt: skip


SETTINGS: dict[str, Any] = {
    "backbone": "sadajem", "objective": "ebjdat", "updater": "sam", "depth": 16, "width": 2,
    "size": 32, "batch": 64, "pos_share": 0.5, "steps": 10, "adv_steps": 5, "capacity": 1000,
    "device": "cpu", "threads": torch.get_num_threads(), "rounds": 3, "patience": 0.2,
}  # fmt: skip


def flags(given: argparse.Namespace) -> list[str]:
    return [f"--{name.replace('_', '-')}={getattr(given, name)}" for name in SETTINGS]


def main_step(given: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(given.device)
    record = compared(given, (*RIVALS, *((MAIN,) if given.small else VARIANTS[device.type])))
    layouts = {"contiguous": False, "channels_last": True}
    record["floor"] = {name: floor(given, channels_last=last) for name, last in layouts.items()}
    for name, figures in record["steps"].items():
        figures |= rates(name, figures, record["floor"]["channels_last"], given)
        print(name, figures, file=sys.stderr)
    return record


def rates(
    name: str, figures: dict[str, float], least: dict[str, float], given: argparse.Namespace
) -> dict[str, float]:
    """What a step's time says: of the roofline, of the machine, of a whole run."""
    narrow = "bf16" in name  # the roofline is float32's
    product = least["matmul_bf16" if narrow else "matmul"]
    reached = {} if narrow else {
        "of_floor": least["floor_arithmetic_s"] / figures["wall_s"],
        "of_floor_cpu": least["floor_arithmetic_cpu_s"] / figures["cpu_s"],
    }  # fmt: skip
    return {
        **reached,
        "images_per_s": given.batch / figures["wall_s"],
        "tflops": least["flops"] / figures["wall_s"] / 1e12,  # of jemkit's step, whoever takes it
        "of_product_rate": least["flops"] / figures["wall_s"] / product,
        "forecast_hours": EPOCHS * (IMAGES // given.batch) * figures["wall_s"] / 3600,
    }


PARTS = [
    (b, o)
    for b in ("jem", "jempp", "mebm", "sadajem", "classifier")
    for o in ("ce", "pgdat", "trades", "jem", "ebjdat")
    if b != "classifier" or o not in ("jem", "ebjdat")
]


def parts(given: argparse.Namespace) -> dict[str, Any]:
    """Step time and roofline of every backbone with every objective, plain descent."""
    by_part = {}
    for backbone, objective in PARTS:
        one = changed(given, backbone=backbone, objective=objective, updater="plain")
        by_part[f"{backbone} x {objective}"] = {**step_alone(one), **floor(one, channels_last=True)}
    return by_part


def step_alone(given: argparse.Namespace) -> dict[str, float]:
    """One jemkit's figures, with nobody beside it."""
    name = MAIN if given.device == "cpu" else "jemkit+cl"
    return dict(compared(given, (name,))["steps"][name])


SCALES: dict[str, tuple[int, ...]] = {
    "steps": (5, 10, 20), "adv_steps": (1, 5, 10), "batch": (16, 32, 64), "width": (1, 2, 4),
    "size": (16, 32, 64),
}  # fmt: skip


def scaling(given: argparse.Namespace) -> dict[str, Any]:
    """Step time and memory as one size grows and the others stay."""
    most = 1 if given.small else None
    return {
        name: {value: step_alone(changed(given, **{name: value})) for value in values[:most]}
        for name, values in SCALES.items()
    }


def changed(given: argparse.Namespace, **values: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(given), **values})


SMALL = {
    "depth": 10, "width": 1, "size": 8, "batch": 16, "steps": 5, "adv_steps": 5, "capacity": 16,
    "rounds": 2, "patience": 0.0,
}  # fmt: skip
WHAT = {
    "step": (main_step, "step_against_released"), "parts": (parts, "step_parts"),
    "scaling": (scaling, "step_scaling"),
}  # fmt: skip
"""What `--what` measures, and the name of its record."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=list(WHAT), default="step")
    parser.add_argument("--small", action="store_true", help="toys; writes no file")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args()
    return changed(given, **SMALL) if given.small else given


if __name__ == "__main__":
    given = arguments()
    if given.contestant:
        serve(given)
    else:
        measure, name = WHAT[given.what]
        print(json.dumps(measure(given))) if given.small else keep(name, measure(given))
