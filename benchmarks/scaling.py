"""The cost of distributed training: collectives measured with gloo, and a model of the rest.

`python benchmarks/scaling.py` writes results/scaling.json. `--step SECONDS --bandwidth GB/S` prints
the expected efficiency for the step time and network bandwidth of your own system.
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tools import keep

from jemkit.models.networks import WRN, NetworkSpec, SmallCNN
from jemkit.runtime import distributed
from jemkit.runtime.work_cache import Shard

NETWORKS: dict[str, tuple[NetworkSpec, tuple[int, int, int]]] = {
    "smallcnn": (SmallCNN(), (1, 8, 8)),
    "wrn-10-2": (WRN(depth=10, width=2), (3, 32, 32)),
    "wrn-28-10": (WRN(depth=28, width=10), (3, 32, 32)),
}
ROUNDS = 5


def numbers(name: str) -> int:
    """Gradients that a process gives away in one backward."""
    spec, shape = NETWORKS[name]
    with torch.device("meta"):
        return sum(p.numel() for p in spec.build(shape).parameters())


def timed(folder: str, me: Shard, counts: list[int]) -> None:
    """Seconds of a scalar's average, of the exchange between steps, and of each reduction."""
    torch.set_num_threads(1)
    with distributed.group(init=f"file://{folder}/meeting", shard=me), distributed.together():
        average = _median(lambda: distributed.averages([torch.zeros(())]))
        medians = [average, _median(lambda: distributed.total(0, 1))]
        for n in counts:
            grads = [torch.ones(part) for part in (n // 2, n - n // 2)]
            medians.append(_median(lambda grads=grads: distributed.reduce(grads)))
    torch.save(medians, Path(folder) / f"{me.rank}.pt")


def _median(work: Any) -> float:
    work()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measured(size: int = 2) -> dict[str, Any]:
    """By gloo over the loopback of this machine."""
    counts = {name: numbers(name) for name in NETWORKS}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        given = [(folder, Shard(rank, size), list(counts.values())) for rank in range(size)]
        running = [spawn.Process(target=timed, args=each) for each in given]
        for process in running:
            process.start()
        for process in running:
            process.join()
        scalar, exchange, *reductions = torch.load(Path(folder) / "0.pt")
    networks = {
        name: {"gradients": n, "MB": round(n * 4e-6, 2), "ms": round(1e3 * seconds, 2)}
        for (name, n), seconds in zip(counts.items(), reductions, strict=True)
    }
    small = {"scalar_ms": round(1e3 * scalar, 3), "exchange_ms": round(1e3 * exchange, 3)}
    return {"processes": size, **small, "networks": networks}


def shared(n: int, size: int, bandwidth: float, latency: float) -> float:
    """Seconds to average n float32 numbers among processes: a ring's volume, a tree's depth."""
    if size == 1:
        return 0.0
    buckets = math.ceil(n / distributed.BUCKET)
    volume = 2 * (size - 1) / size * 4 * n / bandwidth
    return volume + buckets * 2 * math.ceil(math.log2(size)) * latency


def efficiency(
    step: float,
    n: int,
    size: int,
    *,
    passes: int,
    bandwidth: float,
    latency: float,
    exchange: float,
) -> float:
    """Share of a step that is not spent on others, each process keeping its rows.

    Nothing is hidden behind the backward pass; four small collectives a step beside the gradients.
    """
    if size == 1:
        return 1.0
    depth = math.ceil(math.log2(size))
    small = 4 * 2 * depth * latency + 2 * depth * exchange
    return step / (step + passes * shared(n, size, bandwidth, latency) + small)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--step", type=float, help="seconds of one process's step")
    options.add_argument("--network", choices=NETWORKS, default="wrn-28-10")
    options.add_argument(
        "--passes", type=int, default=2, help="backwards a step: 2 for SAM and AWP"
    )
    options.add_argument("--bandwidth", type=float, default=25.0, help="GB/s of a process's link")
    options.add_argument("--latency", type=float, default=20.0, help="microseconds of a hop")
    options.add_argument(
        "--exchange", type=float, default=200.0, help="of a hop by TCP, between steps"
    )
    given = options.parse_args()
    if given.step is None:
        keep("scaling", measured())
        return
    for size in (1, 2, 8, 64, 512):
        share = efficiency(
            given.step, numbers(given.network), size, passes=given.passes,
            bandwidth=given.bandwidth * 1e9, latency=given.latency * 1e-6,
            exchange=given.exchange * 1e-6,
        )  # fmt: skip
        print(f"{size:4d} processes: {share:6.1%}")


if __name__ == "__main__":
    main()
