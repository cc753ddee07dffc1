"""Memory: a network's passes in slices of a micro-batch, which is halved where memory runs out."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from jemkit.errors import NO_MEMORY, OutOfMemory
from jemkit.runtime import distributed
from jemkit.runtime.modes import SameModes, batch_norms

log = logging.getLogger(__name__)

T = TypeVar("T")

RECOMPUTE = "run.recompute=true"


class MicroBatch:
    """The most images in one pass of a network, 0 for however many come.

    The batch, what is drawn for it and the loss on it stay whole: a pass is cut, its scores are
    put together, and the way back computes each slice anew, so that one slice's activations are
    held at a time and not the batch's. That is exact wherever rows do not know each other. Where
    batch norm takes the batch's own statistics they do, and a pass stays whole: with `recompute`
    a network that can keeps half of what its update's way back needs and makes the rest anew; on
    a GPU, where that is not enough, all of it waits in the host's memory.
    """

    def __init__(self, size: int = 0, *, recompute: bool = False) -> None:
        self.size, self.recompute = size, recompute
        self._most = 0  # images of the largest pass
        self._whole = False  # whether the last pass was too large, and was not cut
        self._able = False  # whether it kept what could be made anew, if asked
        self._hosted = False  # whether the one under way keeps everything in the host's memory

    @contextmanager
    def active(self) -> Iterator[None]:
        """Every pass inside the block keeps to it."""
        token = _HELD.set(self)
        try:
            yield
        finally:
            _HELD.reset(token)

    def fit(
        self,
        work: Callable[[], T],
        rng: Generator | None = None,
        *,
        moved: Callable[[], int] = lambda: 0,
        told: Callable[..., None] = lambda **what: None,
    ) -> T:
        """Do the work, and again with less memory wherever that runs out: first with activations
        made anew, where the network can, then with half the images in a pass, as often as it takes.

        Work must be as if not begun where it fails; `rng` is put back for it. Where `moved` has
        gone on, or other processes take part, it cannot be begun again. `told` hears of every cure.
        """
        state, before = rng.get_state() if rng else None, moved()
        while True:
            self._most, self._whole, self._able = 0, False, False
            with self.active():
                try:
                    return work()
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            # outside of `except`: the error is gone, and with it the frames that held the work
            self._check(reason, undone=moved() == before)
            release()
            told(**(self._halve(reason) if self._keeps_little else self._keep_less(reason)))
            if rng is not None and state is not None:
                rng.set_state(state)

    def cuts(self, n: int) -> bool:
        """Whether a pass of n images is too large for it; remembers n."""
        self._most = max(self._most, n)
        return 0 < self.size < n

    def microbatched(self, part: Callable[[Tensor], Tensor], x: Tensor, of: nn.Module) -> Tensor:
        """part(x), [B, ...] for x [B, ...], slice by slice; `of` is the module whose part it is."""
        cut = self.cuts(len(x))
        tied = any(m.training or m.running_mean is None for m in batch_norms(of))
        self._whole, hosted = tied and cut, tied and cut and x.is_cuda
        asked = torch.is_grad_enabled() and any(p.requires_grad for p in of.parameters())
        self._able = asked and can_recompute(of) and not hosted
        if hosted:
            return self._on_host(part, x)
        if tied or not cut:
            return part(x)
        slices = x.tensor_split(-(-len(x) // self.size))  # even: a product of one row rounds apart
        if not torch.is_grad_enabled():
            return torch.cat([part(piece) for piece in slices])
        return torch.cat([checkpointed(part, piece, of) for piece in slices])

    @property
    def recomputes(self) -> bool:
        """Whether the pass under way should recompute its activations."""
        return self.recompute and not self._hosted

    @property
    def _keeps_little(self) -> bool:
        """Whether the last pass kept as little as its network can."""
        return self.recompute or not self._able

    def _on_host(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self._hosted = True
        try:
            with save_on_cpu():
                return part(x)
        finally:
            self._hosted = False

    @property
    def _images(self) -> int:
        """Of the largest pass, or slice of one, in the work under way."""
        return min(self.size or self._most, self._most)

    def _keep_less(self, reason: str) -> dict[str, Any]:
        self.recompute = True
        log.warning(
            "out of memory with %d images in a pass (%s); going on with activation checkpointing",
            self._images,
            reason,
        )
        return {"was": self._images, "images": self._images, "recompute": True, "reason": reason}

    def _halve(self, reason: str) -> dict[str, Any]:
        was = self._images
        self.size = was // 2
        log.warning(
            "out of memory with %d images in a pass (%s); going on with %d at a time, of the same "
            "batches",
            was,
            reason,
            self.size,
        )
        return {"was": was, "images": self.size, "reason": reason}

    def _check(self, reason: str, *, undone: bool) -> None:
        """Raise OutOfMemory where smaller slices would not help, or no one can begin again."""
        most = self._images
        cure = f"run.micro_batch={max(1, most // 2)}" if self._keeps_little else RECOMPUTE
        if distributed.size() > 1:
            raise OutOfMemory(
                f"process {distributed.shard().rank} of {distributed.size()} ran out of memory "
                f"with {most} images in a pass ({reason}). None can take a step again without the "
                f"others: set {cure}; a run goes on by --resume --set {cure}",
                undone=False,
            )
        if not undone:
            raise OutOfMemory(
                f"out of memory ({reason}) after an update had begun, which cannot be undone. The "
                f"newest checkpoint is whole: go on with --resume --set {cure}",
                undone=False,
            )
        if self._whole and self._keeps_little:
            raise OutOfMemory(
                f"out of memory ({reason}) with {self._most} images in a pass that cannot be cut, "
                "since batch norm takes its statistics over all of them: take a smaller batch, a "
                "network of another norm, or backbone.density.batch_norm = running_stats if it "
                "was a chain's"
            )
        if most < 2 and self._keeps_little:
            raise OutOfMemory(
                f"out of memory ({reason}) with {most} image(s) in a pass, so that smaller passes "
                "would not help: take a smaller batch, a smaller network or a larger device"
            )


_HELD: ContextVar[MicroBatch | None] = ContextVar("micro_batch", default=None)


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def can_recompute(network: nn.Module) -> bool:
    """Whether a network heeds `recomputes`; those of this library say so of themselves."""
    return bool(getattr(network, "recomputes", False))


def checkpointed(
    part: Callable[[Tensor], Tensor], x: Tensor, of: nn.Module, *, draws: bool = True
) -> Tensor:
    """part(x), of which x alone is kept: the way back takes the pass again, in the modes of now.

    And among whoever takes part now: on a GPU the way back runs in a thread of torch's own, which
    knows of no micro-batch and of no other process. `draws` is whether torch's generators are used.
    """
    now = copy_context()
    return checkpoint(  # type: ignore[no-any-return]
        lambda x: now.copy().run(part, x), x, use_reentrant=False, preserve_rng_state=draws,
        context_fn=lambda: (nullcontext(), SameModes(of)),
    )  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def microbatched(part: Callable[[Tensor], Tensor], x: Tensor, of: nn.Module) -> Tensor:
    """A network's pass or a part of one, by the micro-batch in force."""
    if torch.compiler.is_compiling():
        return part(x)
    micro = _HELD.get()
    return part(x) if micro is None else micro.microbatched(part, x, of)


def cuts(n: int) -> bool:
    """Whether the micro-batch in force would cut a pass of n images."""
    micro = _HELD.get()
    return micro is not None and micro.cuts(n)


def recomputes() -> bool:
    """Whether the pass under way should keep little and recompute its activations."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    micro = _HELD.get()
    return micro is not None and micro.recomputes


def retry_on_oom(work: Callable[[], T], rng: Generator | None = None) -> T:
    """Work that can be done again, by the micro-batch in force or by one of its own."""
    return (_HELD.get() or MicroBatch()).fit(work, rng)
