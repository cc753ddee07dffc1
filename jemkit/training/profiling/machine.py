"""Rates of this machine: of given operations, of a large matrix product, of a copy."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator

from jemkit.runtime.timing import PATIENCE, Clock, elapsed, fastest
from jemkit.training.profiling.flops import Operation, Work

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
