"""Many processes as one: what they average, agree on and tell each other (torch.distributed).

Every function is the identity outside of `together`, and costs nothing there. Averages are over
processes, which all hold equally many rows.
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
"""Numbers in one all_reduce: 100 MB of float32."""

STEP, WAIT = timedelta(minutes=30), timedelta(days=2)
"""How long a collective may last; and how long an order is waited for, while one process judges."""

_together: ContextVar[bool] = ContextVar("together", default=False)
_host: ContextVar[dist.ProcessGroup | None] = ContextVar("host", default=None)  # gloo, for orders


@contextmanager
def group(
    device: str = "cpu", *, init: str = "env://", shard: Shard | None = None
) -> Iterator[None]:
    """Join the processes that torchrun started; nccl carries CUDA tensors, gloo all others.

    A process that is alone stays as it is. `init` and `shard` serve who starts processes by hand.
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
    life = f"{_restarts()}/{me.size}"  # the store may still know ports of processes that were lost
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
            f"process {local} of this machine has no GPU of its own, torch sees {there}: start "
            f"torchrun with --nproc-per-node {there}, or take --device cpu"
        )
    return local


def shard() -> Shard:
    """This process's rank, and how many there are."""
    return WHOLE if _host.get() is None else Shard(dist.get_rank(), dist.get_world_size())


def restarted() -> bool:
    """Whether torchrun started the processes again, since one of them was lost."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes run at once. Outside of it each computes for itself."""
    token = _together.set(True)
    try:
        yield
    finally:
        _together.reset(token)


def size() -> int:
    """How many processes run this very block."""
    return shard().size if _together.get() else 1


class _Sum(torch.autograd.Function):
    """The sum over processes; so is its gradient, of the sum of all processes' losses."""

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
    """The processes' average, differentiable.

    With gradients that are averaged in turn, the weights get the slope that one process with all
    rows would find.
    """
    n = size()
    return x if n == 1 else _total(x) / n


def mean(x: Tensor) -> Tensor:
    """The mean of a whole batch of which each process holds a share [b, ...]; differentiable.

    For whatever is not linear in a batch mean, such as its square: averaging gradients is exact
    for all else.
    """
    return average(x.mean())


def averages(values: Sequence[Tensor]) -> list[Tensor]:
    """Every scalar's average, by one collective; not finite where any process's is not."""
    n = size()
    if n == 1 or not values:
        return list(values)
    flat = torch.stack([value.detach().float() for value in values])
    dist.all_reduce(flat)
    return list((flat / n).unbind())


@torch.no_grad()
def reduce(tensors: Iterable[Tensor]) -> None:
    """Average tensors in place: one all_reduce a bucket of them, all under way at once."""
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
    """Neighbours of one type, up to BUCKET numbers."""
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
    """Every process's tensors become the first one's."""
    if size() > 1:
        for t in tensors:
            flat = t.detach().contiguous()
            dist.broadcast(flat, src=0)
            t.copy_(flat)


def tell(order: dict[str, Any]) -> None:
    """The first process says what all do next."""
    _send(json.dumps(order).encode())


def heard() -> dict[str, Any]:
    """What the first process says; waits for it."""
    return json.loads(_receive())  # type: ignore[no-any-return]


def share(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The first process's tensors, on the host of every process; the others give None."""
    if tensors is not None:
        _send(safetensors.torch.save(_plain(tensors)))
        return tensors
    return safetensors.torch.load(_receive())


def gather(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every process's tensors at the first one, in order of rank; nothing at the others."""
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
