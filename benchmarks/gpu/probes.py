"""Checks of what is most likely to fail on a first GPU, one function each.

    python probes.py NAME --out DIR --work DIR --seconds S    one of them, in this process

Each returns its results. `stage_probes.py` runs each in its own process, so that one that hangs or
crashes does not affect the others. In a rehearsal on the CPU, checks of synchronisation, CUDA
graphs and memory limits are skipped.
"""

import json
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from stage import Given, given_of, parser, say
from torch import Generator, nn

from jemkit import EnergyModel, Guard, ModelEnergy, resolve, train_step
from jemkit.config.recipe import Resolved
from jemkit.config.registry import installed
from jemkit.evaluation.evaluate import evaluate
from jemkit.models.networks import WRN
from jemkit.runtime.microbatch import MicroBatch
from jemkit.runtime.modes import sampling_mode
from jemkit.runtime.precision import numerics
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.sampling.compile import CompiledGradient
from jemkit.sampling.kernels import SGLD, eager_gradient, gradients_by, run
from jemkit.testing import toy_model, toy_task
from jemkit.training.build import RunState, build_run
from jemkit.training.trainer import Trainer

REGISTRY = installed(third_party=False)
TASK = toy_task()


def recipe(given: Given, options: dict[str, object]) -> Resolved:
    """SADA-JEM with EB-JDAT on digits and a small WRN, for a handful of steps."""
    overrides = {
        "backbone.use": "sadajem", "objective.use": "ebjdat", "updater.use": "plain",
        "run.device": given.device, "run.max_train": 400, "run.batch_size": 64, "run.epochs": 1,
        "backbone.network.use": "wrn", "backbone.network.depth": 10, "backbone.network.width": 1,
    } | options  # fmt: skip
    if overrides["backbone.use"] != "classifier":
        overrides |= {"backbone.steps": 3}
    if overrides["backbone.use"] not in ("classifier", "dat"):  # which have no replay buffer
        overrides |= {"backbone.buffer.capacity": 300}
    return resolve(REGISTRY, overrides=[f"{k}={_toml(v)}" for k, v in overrides.items()])


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def model_of(given: Given, **options: Any) -> EnergyModel:
    model = toy_model(TASK, WRN(depth=10, width=1, **options)).to(given.device)
    return model.to(memory_format=torch.channels_last)


def steps(parts: RunState, count: int) -> None:
    """Train steps without anything around them."""
    guard = Guard()
    parts.backbone.model.train()
    for _ in range(count):
        batch = parts.loader.batch()
        train_step(parts.backbone, parts.objective, parts.updater, batch, parts.rng, guard)
    guard.settle()


def _compiled(given: Given, backend: Any) -> dict[str, Any]:
    """Compiled gradients beside eager ones, by the norm of their difference.

    Single pixels say nothing: where rounding moves an activation across the kink of LeakyReLU, its
    slope changes by a factor of five.
    """
    unit, model, error = CompiledGradient(backend), model_of(given), 0.0
    x = torch.rand((8, *TASK.shape), device=given.device)
    with sampling_mode(model, "batch_stats"):
        energy = ModelEnergy(model)
        for turn in range(4):  # the first calls warm up, the next ones record a CUDA graph
            z = x.roll(turn, 0)
            gradient, wanted = unit(energy, z), eager_gradient(energy, z)
            error = max(error, float((gradient - wanted).norm() / wanted.norm()))
            with torch.no_grad():
                for p in model.parameters():  # an update, which a recorded graph must see
                    p.mul_(0.9)
        with gradients_by(unit):
            rng = Generator(given.device).manual_seed(0)
            end = run(SGLD(), energy, x, rng, 5)
    if not error < 0.02:
        raise RuntimeError(f"compiled gradients are off by {error:.1%} of the eager ones' norm")
    if not end.isfinite().all():
        raise RuntimeError("a compiled chain ends where numbers are not finite")
    if unit.given_up:
        raise RuntimeError("gradients were not compiled: no compiler was found")
    return {
        "seconds_of_compiling": round(unit.warm_up, 1),
        "graphs": len(unit.compilations),
        "relative_error": error,
    }


def compiled_eager(given: Given) -> dict[str, Any]:
    """Gradients traced by dynamo, run eagerly."""
    return _compiled(given, "eager")


def compiled_inductor(given: Given) -> dict[str, Any]:
    """Gradients compiled by inductor, on CUDA as a CUDA graph."""
    return _compiled(given, "inductor")


def failed_compile(given: Given) -> dict[str, Any]:
    """After a compile that fails the process goes on: gradients, generator, allocator."""

    @torch.compile(fullgraph=True, backend="eager")
    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    try:
        broken(torch.ones(3, device=given.device))
    except Exception as error:  # whatever torch raises here
        kind = type(error).__name__
    else:
        raise RuntimeError("a graph break was compiled as one graph")
    model, x = model_of(given), torch.rand((4, *TASK.shape), device=given.device)
    gradient = eager_gradient(ModelEnergy(model), x)
    rng = Generator(given.device).manual_seed(0)
    noise = torch.randn(3, generator=rng, device=given.device)
    if not (gradient.isfinite().all() and noise.isfinite().all()):
        raise RuntimeError("numbers are not finite after a failed compile")
    return {"error": kind}


@contextmanager
def _waits(given: Given, where: str, stacks: Counter[str]) -> Iterator[None]:
    """Count the places at which the host waits for the device."""
    if given.device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for each in caught:
        if "synchron" in str(each.message):
            stacks[f"{where}: {Path(each.filename).name}:{each.lineno}"] += 1


def no_step_waits(given: Given) -> dict[str, Any]:
    """A whole training step of every backbone with every updater waits for nothing."""
    stacks: Counter[str] = Counter()
    tried = 0
    for backbone in sorted(REGISTRY["backbone"]):
        for updater in sorted(REGISTRY["updater"]):
            objective = "pgdat" if backbone == "classifier" else "ebjdat"
            overrides: dict[str, object] = {
                "backbone.use": backbone,
                "updater.use": updater,
                "objective.use": objective,
            }
            if updater == "agr":
                overrides["updater.start"] = 0
            parts = build_run(recipe(given, overrides).recipe)
            tried += 1
            if given.toy and tried > 2:
                continue
            guard = Guard()
            parts.backbone.model.train()
            for turn in range(3):
                batch = parts.loader.batch()
                alarm = _waits(given, f"{backbone} x {updater}", stacks if turn == 2 else Counter())
                with alarm:
                    train_step(
                        parts.backbone, parts.objective, parts.updater, batch, parts.rng, guard
                    )
            guard.settle()
    if stacks:
        raise RuntimeError(f"the host waits for the device: {dict(stacks)}")
    return {"combinations": tried}


def fused_optimizers(given: Given) -> dict[str, Any]:
    """SGD and Adam in both memory layouts, saved and loaded amid a run, end as uncut."""
    tried = 0
    for optimizer in ("sgd", "adam"):
        for layout in ("yes", "no"):
            overrides = {
                "optimizer.use": optimizer, "run.channels_last": layout, "run.ema_decay": 0.9,
                "run.deterministic": True,
            }  # fmt: skip
            resolved = recipe(given, overrides)
            with tempfile.TemporaryDirectory() as folder:
                whole = Trainer(resolved, RunFolder.create(Path(folder) / "whole"))
                whole.run(until=4)
                cut = Trainer(resolved, RunFolder.create(Path(folder) / "cut"))
                cut.run(until=2)
                rest = Trainer(resolved, RunFolder(Path(folder) / "cut"))
                rest.load_state_dict(cut.state_dict())
                rest.run(until=4)
                ends = [t.state_dict() for t in (whole, rest)]
            for key in ("model", "optimizer", "ema", "density", "rng"):
                if not same(ends[0][key], ends[1][key]):
                    raise RuntimeError(f"{optimizer}, channels_last {layout}: {key} differs")
            tried += 1
    return {"combinations": tried}


def deterministic(given: Given) -> dict[str, Any]:
    """Two runs of one seed are one, in fp32 and in bf16."""
    for precision in ("fp32", "bf16"):
        overrides = {"updater.use": "sam", "run.deterministic": True, "run.precision": precision}
        ends = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                trainer = Trainer(recipe(given, overrides), RunFolder.create(Path(folder) / "run"))
                trainer.run(until=4)
                ends.append(trainer.state_dict())
        if not same(ends[0]["model"], ends[1]["model"]):
            raise RuntimeError(f"{precision}: two runs of one seed differ")
    return {"precisions": ["fp32", "bf16"]}


def out_of_memory(given: Given) -> dict[str, Any]:
    """A device that is full is made to do with smaller passes, and works on after that."""
    model = toy_model(TASK, WRN(depth=16, width=8 if given.device == "cuda" else 1, norm="group"))
    model.to(given.device)
    micro, calls = MicroBatch(), [0]
    count = 16384 if given.device == "cuda" else 16
    x = torch.rand((count, *TASK.shape), device=given.device)
    if given.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.02)

    def work() -> float:
        calls[0] += 1
        model.zero_grad()
        energy = model(x).energy
        if given.device == "cpu" and calls[0] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory, as a rehearsal has it")
        energy.mean().backward()
        return float(next(model.parameters()).grad.norm())

    norm = micro.retry_on_oom(work)
    if calls[0] < 2:
        raise RuntimeError("memory did not run out: the probe tried nothing")
    if not math.isfinite(norm):
        raise RuntimeError("the gradient after an out-of-memory error is not finite")
    return {"micro_batch": micro.size, "recompute": micro.recompute, "tries": calls[0]}


def evaluators(given: Given) -> dict[str, Any]:
    """Every attack and evaluator on the device, AutoAttack's four parts included."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 15 * 15, 10)
    net = nn.Sequential(*layers).to(given.device)
    count = 120 if given.device == "cuda" else 20
    x = torch.rand(count, 3, 32, 32)
    with torch.no_grad():
        data = x, net(x.to(given.device)).argmax(1).cpu()  # all right before the attacks
    apart = {"bpda"} | ({"aa", "cw"} if given.toy else set())  # a refinement; minutes on a CPU
    attacks = tuple(sorted(set(REGISTRY["attack"]) - apart))
    record = evaluate(net, data, attacks=attacks, eps_px=2, options={"square": {"queries": 50}})
    wrong = [f.name for f in record.figures if not math.isfinite(f.value)]
    if wrong:
        raise RuntimeError(f"figures that are not finite: {wrong}")
    return {f.name: round(f.value, 4) for f in record.figures}


def precisions(given: Given) -> dict[str, Any]:
    """Energy gradients of a WRN in each precision against float64, the relative error."""
    model, errors = model_of(given, norm="batch").eval(), {}
    x = torch.rand((16, *TASK.shape), device=given.device)
    exact = eager_gradient(ModelEnergy(model.double()), x.double())
    model.float()
    for precision in ("fp32", "tf32", "bf16"):
        narrow = torch.autocast(given.device, torch.bfloat16, enabled=precision == "bf16")
        with numerics(precision=precision), narrow:  # type: ignore[arg-type]
            gradient = eager_gradient(ModelEnergy(model), x).double()
        errors[precision] = float((gradient - exact).norm() / exact.norm())
    if errors["fp32"] > 1e-3:
        raise RuntimeError(f"fp32 is not float32: relative errors {errors}")
    return errors


PROBES: tuple[Callable[[Given], dict[str, Any]], ...] = (
    compiled_eager, compiled_inductor, failed_compile, no_step_waits, fused_optimizers,
    deterministic, out_of_memory, evaluators, precisions,
)  # fmt: skip


def main() -> None:
    options = parser()
    options.add_argument("name", choices=[probe.__name__ for probe in PROBES])
    given = options.parse_args()
    probe = next(p for p in PROBES if p.__name__ == given.name)
    with numerics():  # as a run in fp32 has torch's switches: its own let convolutions be tf32
        result = probe(given_of(given))
    say(result, given.result) if given.result else print(json.dumps(result))


if __name__ == "__main__":
    main()
