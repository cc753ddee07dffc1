"""The pause of training for a checkpoint: WRN-28-10, momentum, a buffer of 10,000 images.

    python benchmarks/checkpoints.py [--device cuda]

The pause is the time of `Writer.save`. It is compared with `checkpoint.save`, which writes
everything before it returns. Also measured is how much slower the training thread computes while
the file is written.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tools import keep

from jemkit.models.energy import LogSumExpEnergy
from jemkit.models.networks import WRN
from jemkit.runtime import checkpoint
from jemkit.runtime.disk import state_bytes
from jemkit.runtime.pytree import same

ROUNDS = 6


def state_of(device: torch.device) -> dict[str, Any]:
    """What SADAJEM on CIFAR-10 saves: weights, momenta, replay buffer, generators."""
    model = LogSumExpEnergy(WRN().build((3, 32, 32)), 10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    rng = torch.Generator(device).manual_seed(0)
    images = torch.rand((10_000, 3, 32, 32), generator=rng, device=device)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "density": {"states": images, "drawn": 10_000},
        "loader": {"step": 1, "order": torch.arange(45_000, device=device)},
        "rng": rng.get_state(),
    }


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def steps_per_second(device: torch.device, until: Callable[[], bool]) -> float:
    """How often a training thread gets a small piece of work done while `until` is not."""
    rng = torch.Generator(device).manual_seed(1)
    x, done, began = torch.rand((256, 256), generator=rng, device=device), 0, time.perf_counter()
    while not until():
        float((x @ x).sum())
        done += 1
    return done / (time.perf_counter() - began)


def measured(device: torch.device, folder: Path) -> dict[str, Any]:
    state = state_of(device)
    whole = [
        seconds(lambda i=i: checkpoint.save(folder / f"whole-{i}", state), device)  # type: ignore[misc]
        for i in range(2)
    ]
    writer, stalls, spent, behind, beside = checkpoint.Writer(), [], [], [], []
    writer.ready({**state, "optimizer": {}})  # as a run begins, when there is no momentum yet
    end = time.perf_counter() + 1
    unloaded = steps_per_second(device, lambda: time.perf_counter() > end)
    for i in range(ROUNDS):
        written: list[float] = []
        cpu = time.thread_time()
        stalls.append(
            seconds(
                lambda i=i, written=written: writer.save(  # type: ignore[misc]
                    folder / f"step-{i}",
                    state,
                    best=folder / "best",
                    then=lambda: written.append(time.perf_counter()),
                ),
                device,
            )
        )
        spent.append(time.thread_time() - cpu)
        began = time.perf_counter()
        beside.append(steps_per_second(device, lambda written=written: bool(written)))  # type: ignore[misc]
        behind.append(written[0] - began)
        writer.wait()
    if not same(checkpoint.load(folder / "best"), state):
        raise SystemExit("what was read is not what was written")
    return {
        "device": device.type,
        "checkpoint_mb": round(state_bytes(state) / 1e6, 1),
        "save_ms": round(1e3 * statistics.median(whole), 1),
        "first_stall_ms": round(1e3 * stalls[0], 1),
        "stall_ms": round(1e3 * statistics.median(stalls[1:]), 1),
        "stall_cpu_ms": round(1e3 * statistics.median(spent[1:]), 1),  # whatever else runs here
        "worst_stall_ms": round(1e3 * max(stalls[1:]), 1),
        "written_behind_ms": round(1e3 * statistics.median(behind), 1),
        "speed_while_writing": round(statistics.median(beside) / unloaded, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        figures = measured(torch.device(given.device), Path(folder))
    keep(f"checkpoints-{given.device}", figures)


if __name__ == "__main__":
    main()
