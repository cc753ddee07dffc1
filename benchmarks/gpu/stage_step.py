"""The time of a training step: two networks, each precision, compiled, and the released schedule.

Each configuration has its own process and time limit; the most important ones run first. Times are
medians of steps after the first one, with synchronisation. `of_product_rate` is the share of the
measured rate of a large bf16 product, `forecast_hours` the time for 100 epochs of 45,000 images.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import torch
from records import Record
from stage import Given, given_of, parser, say

from jemkit.runtime.precision import numerics
from jemkit.runtime.timing import fastest, settle
from jemkit.training.profiling.roofline import flops, product_rate, step_work
from jemkit.updaters import SAM, Plain

BATCH, EPOCHS, IMAGES = 128, 100, 45_000
GIB = 2**30

CONTESTANTS = (
    ("wrn-16-4", "bf16"), ("wrn-28-10", "bf16"), ("wrn-28-10", "released"),
    ("wrn-28-10", "bf16+compile"), ("wrn-28-10", "fp32"), ("wrn-16-4", "bf16+compile"),
    ("wrn-28-10", "tf32"), ("wrn-16-4", "released"), ("wrn-16-4", "fp32"), ("wrn-16-4", "tf32"),
)  # fmt: skip
REHEARSED = (("wrn-28-10", "fp32"), ("wrn-28-10", "released"))
PROFILED = ("wrn-28-10", "fp32"), ("wrn-28-10", "bf16+compile")
LIMIT = 90.0
"""Seconds of one contestant, of which compiling wrn-28-10 takes the most."""


def setting(network: str, given: Given) -> argparse.Namespace:
    """The step of SADA-JEM with EB-JDAT as benchmarks/steps.py builds it."""
    from steps import SETTINGS, SMALL, changed

    _, depth, width = network.split("-")
    base = changed(argparse.Namespace(**SETTINGS), device=given.device)
    if given.toy:
        return changed(base, **SMALL)
    return changed(base, depth=int(depth), width=int(width), batch=BATCH, capacity=10_000)


def step_of(setting: argparse.Namespace, variant: str) -> Callable[[], Any]:
    import steps

    if variant == "released":
        return steps.released(setting)
    kinds = [kind for kind in variant.split("+") if kind in ("bf16", "compile")]
    return steps.jemkit(setting, "cl", *kinds)


def contest(given: Given, network: str, variant: str) -> Iterator[dict[str, Any]]:
    """Seconds and memory of a step, the first one, which compiles, by itself; then its profile.

    They are given after every step, so that a process that is ended leaves those so far.
    """
    device, settings = torch.device(given.device), setting(network, given)
    step = step_of(settings, variant)
    with numerics(precision="tf32" if variant == "tf32" else "fp32"):
        first = _seconds(step, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        while len(times) < 3 or (sum(times) < 4 and len(times) < 50):
            times.append(_seconds(step, device))
            figures: dict[str, Any] = {
                "first_s": first,
                "step_s": statistics.median(times),
                "steps": len(times),
                "images_per_s": settings.batch / statistics.median(times),
            }
            if device.type == "cuda":
                figures["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            yield figures
        if (network, variant) in PROFILED:
            yield figures | {"profile": profile(step, device)}


def _seconds(step: Callable[[], Any], device: torch.device) -> float:
    settle(device)
    began = time.perf_counter()
    step()
    settle(device)
    return time.perf_counter() - began


def profile(step: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """The kernels that one step spends its time in, the longest first, in milliseconds."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watching

    cuda = device.type == "cuda"
    with watching(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        settle(device)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, key))[:15]
    return [{"kernel": r.key[:120], "ms": getattr(r, key) / 1e3, "calls": r.count} for r in rows]


def rates(given: Given) -> dict[str, float]:
    """The device alone: large products, a copy of 1 GiB."""
    device = torch.device(given.device)
    figures = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with numerics():
            figures[f"product_{name}"] = product_rate(device, dtype)
    size = GIB if device.type == "cuda" else 2**20
    source = torch.empty(size // 4, device=device).normal_(
        generator=torch.Generator(device).manual_seed(0)
    )
    target = torch.empty_like(source)
    figures["bandwidth"] = 2 * size / fastest(lambda: target.copy_(source), device)
    return figures


def work_of(given: Given, network: str) -> float:
    """FLOP of jemkit's step of a network, counted while one is taken."""
    import steps

    settings = setting(network, given)
    backbone, batch = steps.built(settings)
    spec = Plain() if settings.updater == "plain" else SAM()
    return float(flops(step_work(backbone, steps.objective_of(settings), spec, batch).whole))


def measure(given: Given, record: Record) -> None:
    device = rates(given)
    record.add(rates=device)
    contestants = REHEARSED if given.toy else CONTESTANTS
    work: dict[str, float] = {}
    for network, variant in contestants:
        name = f"{network} {variant}"
        if given.left < 15:
            record.add(**{name: {"status": "not reached"}})
            continue
        result = given.work / "step-result.json"
        result.unlink(missing_ok=True)
        command = processes.python(Path(__file__), network, variant, *given.arguments())
        done = processes.run([*command, "--result", str(result)], min(LIMIT, given.left - 2))
        figures: dict[str, Any] = {"status": done.status}
        if result.exists():
            figures |= json.loads(result.read_text())
            record.add(**{name: figures})
            work[network] = work.get(network) or work_of(given, network)
            figures |= forecast(figures["step_s"], work[network], device["product_bf16"], given)
        if not done.passed:
            figures["output"] = done.output[-2000:]
        record.add(**{name: figures})
    record.add(**against_released(record.content))
    names = [f"{network} {variant}" for network, variant in contestants]
    bad = ("failed", "timeout")
    failed = [name for name in names if record.content[name]["status"] in bad]
    if failed:
        raise RuntimeError(f"steps that failed: {', '.join(failed)}")


def forecast(step_s: float, work: float, product: float, given: Given) -> dict[str, float]:
    batch = setting("wrn-16-4", given).batch
    return {
        "tflops": work / step_s / 1e12,
        "of_product_rate": work / step_s / product,
        "forecast_hours": EPOCHS * (IMAGES // batch) * step_s / 3600,
    }


def against_released(content: dict[str, Any]) -> dict[str, Any]:
    """How many times the released schedule takes each contestant's step."""
    ratios = {}
    for name, figures in content.items():
        network, _, variant = name.partition(" ")
        released = content.get(f"{network} released", {})
        if variant and variant != "released" and "step_s" in figures and "step_s" in released:
            ratios[name] = released["step_s"] / figures["step_s"]
    return {"released / this": ratios}


def main() -> None:
    options = parser()
    options.add_argument("network")
    options.add_argument("variant")
    given = options.parse_args()
    for result in contest(given_of(given), given.network, given.variant):
        say(result, given.result) if given.result else print(json.dumps(result))


if __name__ == "__main__":
    main()
