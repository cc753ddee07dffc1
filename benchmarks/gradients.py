"""The gradient of a chain, eager and compiled, against forward and backward of the bare network.

    python benchmarks/gradients.py           wrn-16-2, 3 x 32 x 32: 32 images with batch
                                             statistics (chains), 64 with running ones (attacks)
    python benchmarks/gradients.py --small   on toy models, as a smoke test; writes no file

`bare` is the network in torch's default memory format, with weights that require gradients.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # a first run's warm-up

import torch
from steps import SETTINGS, built, changed
from tools import keep
from torch import Tensor

from jemkit.models.energy import EnergyModel, ModelEnergy
from jemkit.runtime.modes import eval_mode, frozen, sampling_mode
from jemkit.runtime.precision import numerics
from jemkit.runtime.timing import elapsed
from jemkit.sampling.compile import Backend, CompiledGradient
from jemkit.sampling.kernels import eager_gradient

Work = Callable[[], Any]


@contextmanager
def attacked(model: EnergyModel) -> Iterator[None]:
    with frozen(model), eval_mode(model):
        yield


@contextmanager
def chained(model: EnergyModel) -> Iterator[None]:
    with sampling_mode(model, "batch_stats"):
        yield


def bare(model: EnergyModel, x: Tensor) -> None:
    leaf = x.detach().requires_grad_()
    torch.autograd.grad(model(leaf).energy.sum(), leaf)


def contestants(
    given: argparse.Namespace, mode: Any, images: int, backend: Backend = "inductor"
) -> dict[str, Work]:
    """Each by name, ready to be called."""
    plain, laid = (built(given, channels_last=last)[0].model for last in (False, True))
    x = torch.randn((images, 3, given.size, given.size), device=given.device)
    last = x.contiguous(memory_format=torch.channels_last)

    def at(model: EnergyModel, x: Tensor, gradient: Any) -> Work:
        def work() -> None:
            with mode(model):
                gradient(ModelEnergy(model), x)

        return work

    def sketch() -> None:
        with mode(plain):
            for p in plain.parameters():
                p.requires_grad_(True)
            bare(plain, x)

    return {
        "bare": sketch,
        "jemkit, contiguous": at(plain, x, eager_gradient),
        "jemkit, channels last": at(laid, last, eager_gradient),
        "jemkit, channels last, compiled": at(laid, last, CompiledGradient(backend)),
    }


def in_turn(named: dict[str, Work], device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of each, and how many times `bare` takes that long, round by round."""
    warm = {name: elapsed(work, device) for name, work in named.items()}
    times: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(rounds):
        for name, work in named.items():
            times[name].append(elapsed(work, device))
    figures: dict[str, dict[str, float]] = {
        name: {
            "seconds": statistics.median(each),
            "bare / this": statistics.median(
                a / b for a, b in zip(times["bare"], each, strict=True)
            ),
        }
        for name, each in times.items()
    }
    eager, compiled = (list(figures.values())[i]["seconds"] for i in (-2, -1))
    warm_up = warm["jemkit, channels last, compiled"]
    return {
        **figures,
        "warm_up_s": warm_up,
        "pays_after_gradients": (
            warm_up / (eager - compiled) if compiled < eager else float("inf")
        ),
    }


def measured(given: argparse.Namespace, device: torch.device, rounds: int) -> dict[str, Any]:
    names = ("depth", "width", "size", "threads", "device")
    return {
        "setting": {name: getattr(given, name) for name in names} | {"rounds": rounds},
        "chain, batch statistics": in_turn(
            contestants(given, chained, given.batch // 2), device, rounds
        ),
        "attack, running statistics": in_turn(
            contestants(given, attacked, given.batch), device, rounds
        ),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    given = changed(argparse.Namespace(**SETTINGS), device=options.device)
    if options.small:
        given = changed(given, depth=10, width=1, size=8, batch=4, capacity=8)
    device = torch.device(given.device)
    with numerics():  # a run's switches in fp32: torch's own let a GPU's convolutions be tf32
        result = measured(given, device, options.rounds)
    if options.small:
        print(json.dumps(result))
    else:
        keep("gradients", result)
