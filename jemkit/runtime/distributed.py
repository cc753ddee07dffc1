"""Collectives between processes: averages, agreement, broadcasts (torch.distributed).

Every function is the identity outside of `together`, and costs nothing there. Averages are over
processes, which all have the same number of rows.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from jemkit.errors import ConfigError
from jemkit.runtime.work_cache import WHOLE, Shard

BUCKET = 25_000_000
"""Number of values in one all_reduce: 100 MB of float32."""

STEP, WAIT = timedelta(minutes=30), timedelta(days=2)
"""Timeout of a collective; a decision is waited for as long, while one process evaluates."""

_together: ContextVar[bool] = ContextVar("together", default=False)
_host: ContextVar[dist.ProcessGroup | None] = ContextVar("host", default=None)  # gloo, for orders


@contextmanager
def group(
    device: str = "cpu", *, init: str = "env://", shard: Shard | None = None
) -> Iterator[None]:
    """Join the processes that torchrun started; nccl for CUDA tensors, gloo for all others.

    A single process is unchanged. `init` and `shard` are for processes that are started by hand.
    """
    me = shard or Shard(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if me.size == 1:
        yield
        return
    backend = "gloo"
    if device == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(_own_gpu())
    store, *_ = next(dist.rendezvous(init, me.rank, me.size, timeout=STEP))  # type: ignore[attr-defined]
    life = f"{_restarts()}/{me.size}"  # the store may still know ports of lost processes
    store = dist.PrefixStore(life, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.size, timeout=STEP)
    token = _host.set(dist.new_group(backend="gloo", timeout=WAIT))
    try:
        yield
    finally:
        _host.reset(token)
        dist.destroy_process_group()


def _own_gpu() -> int:
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise ConfigError(
            f"process {local} of this machine has no GPU of its own, torch finds {there}: start "
            f"torchrun with --nproc-per-node {there}, or use --device cpu"
        )
    return local


def shard() -> Shard:
    """The rank of this process, and the number of processes."""
    return WHOLE if _host.get() is None else Shard(dist.get_rank(), dist.get_world_size())


def restarted() -> bool:
    """Whether torchrun restarted the processes after one was lost."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes run together. Outside of it each computes on its own."""
    token = _together.set(True)
    try:
        yield
    finally:
        _together.reset(token)


def size() -> int:
    """The number of processes that run this block."""
    return shard().size if _together.get() else 1


class _Sum(torch.autograd.Function):
    """The sum over processes, differentiable: the gradient is that of the sum of all losses."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, slope: Tensor) -> Tensor:
        return _total(slope)


def _total(x: Tensor) -> Tensor:
    return _Sum.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def average(x: Tensor) -> Tensor:
    """The average over processes, differentiable.

    With gradients that are averaged afterwards, the weights get the gradient that one process with
    all rows would compute.
    """
    n = size()
    return x if n == 1 else _total(x) / n


def mean(x: Tensor) -> Tensor:
    """The mean of a whole batch of which each process has a part [b, ...]; differentiable.

    It is for anything that is not linear in a batch mean, such as its square; for all else
    averaging gradients is exact.
    """
    return average(x.mean())


def averages(values: Sequence[Tensor]) -> list[Tensor]:
    """The average of every scalar, in one collective; not finite if any process's is not."""
    n = size()
    if n == 1 or not values:
        return list(values)
    flat = torch.stack([value.detach().float() for value in values])
    dist.all_reduce(flat)
    return list((flat / n).unbind())


@torch.no_grad()
def reduce(tensors: Iterable[Tensor]) -> None:
    """Average tensors in place: one all_reduce per bucket, all of them asynchronous."""
    n = size()
    if n == 1:
        return
    pending = []
    for bucket in _buckets(tensors):
        flat = torch.cat([t.flatten() for t in bucket])
        pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in pending:
        if work is not None:
            work.wait()
        flat /= n
        parts = torch.split(flat, [t.numel() for t in bucket])
        for t, part in zip(bucket, parts, strict=True):
            t.copy_(part.view(t.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one type, up to BUCKET values."""
    bucket: list[Tensor] = []
    for t in tensors:
        full = sum(b.numel() for b in bucket) + t.numel() > BUCKET
        if bucket and (full or t.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Broadcast rank 0's tensors into every process's."""
    if size() > 1:
        for t in tensors:
            flat = t.detach().contiguous()
            dist.broadcast(flat, src=0)
            t.copy_(flat)


def tell(order: dict[str, Any]) -> None:
    """Broadcast a decision of rank 0."""
    _send(json.dumps(order).encode())


def heard() -> dict[str, Any]:
    """Receive a decision of rank 0; blocks until it arrives."""
    return json.loads(_receive())  # type: ignore[no-any-return]


def share(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Rank 0's tensors, in the host memory of every process; the others pass None."""
    if tensors is not None:
        _send(safetensors.torch.save(_plain(tensors)))
        return tensors
    return safetensors.torch.load(_receive())


def gather(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every process's tensors at rank 0, in order of rank; nothing on the others."""
    me, host = shard(), _host.get()
    own = _bytes(safetensors.torch.save(_plain(tensors)))
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(me.size)]
    dist.all_gather(lengths, torch.tensor([len(own)]), group=host)
    most = int(max(lengths))
    padded = torch.cat([own, own.new_zeros(most - len(own))])
    found = [torch.empty_like(padded) for _ in range(me.size)] if me.rank == 0 else None
    dist.gather(padded, found, dst=0, group=host)
    return [
        safetensors.torch.load(part[: int(n)].numpy().tobytes())
        for part, n in zip(found or [], lengths if found else [], strict=True)
    ]


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _send(content: bytes) -> None:
    dist.broadcast(torch.tensor([len(content)]), src=0, group=_host.get())
    dist.broadcast(_bytes(content), src=0, group=_host.get())


def _receive() -> bytes:
    length = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(length, src=0, group=_host.get())
    content = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, src=0, group=_host.get())
    return content.numpy().tobytes()
