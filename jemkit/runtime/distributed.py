"""Collectives between processes: averages, broadcasts, gathering (torch.distributed).

Every process runs the same code; with a single process each function is the identity. Averages
are taken inside `together` alone, over processes that all have the same number of rows.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

from jemkit.errors import ConfigError, JemkitError
from jemkit.runtime import pytree
from jemkit.runtime.work_cache import WHOLE, Shard

T = TypeVar("T")

BUCKET = 100_000_000
"""Bytes in one all_reduce."""

STEP, WAIT = timedelta(minutes=30), timedelta(days=2)
"""Timeout of a step's collectives, and of those that wait while rank 0 evaluates."""
BACKENDS = ("gloo", "Gloo", "NCCL")
"""Names that occur in the errors of their collectives."""
GRACE = 5.0
"""Seconds within which torchrun stops the other processes after one has ended."""

_together: ContextVar[bool] = ContextVar("together", default=False)
_host: ContextVar[dist.ProcessGroup | None] = ContextVar("host", default=None)  # gloo


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
    life = f"{restarts()}/{me.size}"  # the store may still know ports of lost processes
    store = dist.PrefixStore(life, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.size, timeout=STEP)
    token = _host.set(dist.new_group(backend="gloo", timeout=WAIT))
    try:
        yield
    except RuntimeError as error:  # also of a collective, where a process has ended
        if not (isinstance(error, dist.DistError) or any(b in str(error) for b in BACKENDS)):
            raise
        raise JemkitError(
            f"another process was lost ({str(error).splitlines()[0]}). What is finished is kept: "
            "train --resume goes on from the newest checkpoint, torchrun --max-restarts by itself; "
            "evaluate and sample go on when they are run again"
        ) from None
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


def restarts() -> int:
    """How often torchrun restarted the processes after one was lost."""
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


def average(x: Tensor) -> Tensor:
    """The average over processes, differentiable.

    Once gradients are averaged, they are those that one process with all rows would compute.
    """
    n = size()
    if n == 1:
        return x
    from torch.distributed.nn.functional import all_reduce  # slow to import

    return all_reduce(x) / n  # type: ignore[no-untyped-call, no-any-return]


def mean(x: Tensor) -> Tensor:
    """The mean of a whole batch of which each process has a part [b, ...]; differentiable.

    It is for what is not linear in a batch mean, such as its square; else gradients are averaged.
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
    for bucket in _take_tensors([t for t in tensors if t.numel()], BUCKET):  # type: ignore[no-untyped-call]
        flat = _flatten_dense_tensors(bucket)  # type: ignore[no-untyped-call]
        pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in pending:
        work.wait()
        flat /= n
        parts = _unflatten_dense_tensors(flat, bucket)  # type: ignore[no-untyped-call]
        for t, part in zip(bucket, parts, strict=True):
            t.copy_(part)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Broadcast rank 0's tensors into every process's."""
    if size() > 1:
        for t in tensors:
            flat = t.detach().contiguous()
            dist.broadcast(flat, src=0)
            t.copy_(flat)


def prepared(work: Callable[[], T]) -> T:
    """work() of every process, of rank 0 first; an error of rank 0 is raised in all of them."""
    results: list[T] = []
    _relay(lambda: results.append(work()))
    return results[0] if results else work()


def on_rank_zero(work: Callable[[], T]) -> T:
    """work() of rank 0, broadcast to every process; its error is raised in all of them.

    Every process calls it at once; inside, rank 0 is alone. The value is a tree of dicts, lists,
    tensors and plain values.
    """

    def separately() -> T:
        token = _host.set(None)
        try:
            return work()
        finally:
            _host.reset(token)

    return _relay(separately)


def _relay(work: Callable[[], T]) -> T:
    if _host.get() is None:
        return work()
    if dist.get_rank():
        answer = _unpacked(_broadcast())
        if "error" not in answer:
            return answer["value"]  # type: ignore[no-any-return]
        raise _error_of(*answer["error"])
    try:
        value = work()
    except JemkitError as error:
        _broadcast(_packed({"error": [type(error).__name__, [*error.args], vars(error)]}))
        raise
    _broadcast(_packed({"value": value}))
    return value


def _error_of(name: str, arguments: list[Any], attributes: dict[str, Any]) -> JemkitError:
    kinds: list[type[JemkitError]] = [JemkitError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    error = next(kind for kind in kinds if kind.__name__ == name)(*arguments)
    vars(error).update(attributes, reported=True)
    return error


def total(*counts: int) -> list[int]:
    """The sum over processes of each count, in all of them; of flags, how many processes set it."""
    if _host.get() is None:
        return list(counts)
    sums = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(sums, group=_host.get())
    return [int(n) for n in sums]


def barrier(poll: Callable[[], None] = lambda: None) -> None:
    """Wait until every process is here; `poll` may raise where another one has been stopped."""
    try:
        total(0)
    except RuntimeError:
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            poll()
            time.sleep(0.05)
        raise


def gather(tree: T) -> list[T]:
    """Every process's tree at rank 0, in order of rank; nothing at the others."""
    if _host.get() is None:
        return [tree]
    own, me = _packed(tree), shard()
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(me.size)]
    dist.all_gather(lengths, torch.tensor([len(own)]), group=_host.get())
    padded = torch.cat([own, own.new_zeros(int(max(lengths)) - len(own))])
    gathered = [torch.empty_like(padded) for _ in range(me.size)] if me.rank == 0 else None
    dist.gather(padded, gathered, dst=0, group=_host.get())
    others = zip(gathered[1:], lengths[1:], strict=True) if gathered else ()
    return [tree, *(_unpacked(part[: int(n)]) for part, n in others)] if gathered else []


def _broadcast(content: Tensor | None = None) -> Tensor:
    """Rank 0's bytes, which it gives, in every process."""
    length = torch.tensor([0 if content is None else len(content)])
    dist.broadcast(length, src=0, group=_host.get())
    received = torch.empty(int(length), dtype=torch.uint8) if content is None else content
    dist.broadcast(received, src=0, group=_host.get())
    return received


TREE = "tree"


def _packed(state: Any) -> Tensor:
    """A tree as bytes: its tensors as safetensors, the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(pytree.packed(state, "", tensors)).encode()
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    plain[TREE] = torch.frombuffer(bytearray(tree), dtype=torch.uint8)
    return torch.frombuffer(bytearray(safetensors.torch.save(plain)), dtype=torch.uint8)


def _unpacked(content: Tensor) -> Any:
    tensors = safetensors.torch.load(content.numpy().tobytes())
    return pytree.unpacked(json.loads(bytes(tensors.pop(TREE).tolist())), tensors)
