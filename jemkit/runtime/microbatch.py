"""Micro-batches: a network's passes are split into slices, which are halved on OOM."""

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


class MicroBatch:
    """The maximum number of images per pass of a network; 0 means no limit.

    The batch, its draws and its loss stay whole. A pass is split, its scores are concatenated, and
    the backward pass recomputes each slice, so that memory holds the activations of one slice.

    That is exact if rows are independent. With batch statistics of batch norm they are not, and a
    pass is not split. Instead `recompute` enables activation checkpointing for updates, if the
    network supports it; if that is not enough, a GPU's saved tensors are offloaded to the host.
    """

    def __init__(self, size: int = 0, *, recompute: bool = False) -> None:
        self.size, self.recompute = size, recompute
        self._most = 0  # images of the largest pass
        self._whole = False  # whether the last pass was too large, but could not be split
        self._able = False  # whether it used activation checkpointing, if requested
        self._hosted = False  # whether the current pass offloads to host memory

    @contextmanager
    def active(self) -> Iterator[None]:
        """Every pass inside the block uses it."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def retry_on_oom(
        self,
        work: Callable[[], T],
        rng: Generator | None = None,
        *,
        moved: Callable[[], int] = lambda: 0,
        on_change: Callable[..., None] = lambda **what: None,
    ) -> T:
        """Do the work, and repeat it with less memory after each OOM.

        First activation checkpointing is enabled, if the network supports it; then the micro-batch
        is halved, as often as needed; `on_change` is called each time. Work that fails must have no
        effects but on `rng`; with other processes, or if `moved` has changed, it is not repeated.
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
            # outside of `except`: the error and the frames that referenced the work are freed
            self._check(reason, undone=moved() == before)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            on_change(**self._use_less(reason))
            if rng is not None and state is not None:
                rng.set_state(state)

    def cuts(self, n: int) -> bool:
        """Whether a pass of n images is too large for it; records n."""
        self._most = max(self._most, n)
        return 0 < self.size < n

    def microbatched(self, part: Callable[[Tensor], Tensor], x: Tensor, of: nn.Module) -> Tensor:
        """part(x), [B, ...] for x [B, ...], slice by slice; `of` is the module of `part`."""
        cut = self.cuts(len(x))
        tied = any(m.training or m.running_mean is None for m in batch_norms(of))
        self._whole, hosted = tied and cut, tied and cut and x.is_cuda
        needs_graph = torch.is_grad_enabled() and any(p.requires_grad for p in of.parameters())
        self._able = needs_graph and can_recompute(of) and not hosted
        if hosted:
            self._hosted = True
            try:
                with save_on_cpu():
                    return part(x)
            finally:
                self._hosted = False
        if tied or not cut:
            return part(x)
        # even slices, since a product of one row rounds differently
        slices = x.tensor_split(-(-len(x) // self.size))
        if not torch.is_grad_enabled():
            return torch.cat([part(piece) for piece in slices])
        return torch.cat([checkpointed(part, piece, of) for piece in slices])

    @property
    def recomputes(self) -> bool:
        """Whether the current pass should recompute its activations."""
        return self.recompute and not self._hosted

    @property
    def _keeps_little(self) -> bool:
        """Whether the last pass used as little memory as its network can."""
        return self.recompute or not self._able

    @property
    def _images(self) -> int:
        """The images of the largest pass, or slice of one, in the current work."""
        return min(self.size or self._most, self._most)

    def _use_less(self, reason: str) -> dict[str, Any]:
        """Recompute activations, else halve the micro-batch; returns what changed."""
        was = self._images
        change: dict[str, Any] = {"was": was, "images": was, "reason": reason}
        if self._keeps_little:
            self.size = change["images"] = was // 2
            cure = f"micro-batches of {self.size}, of the same batches"
        else:
            self.recompute = change["recompute"] = True
            cure = "activation checkpointing"
        log.warning("out of memory with %d images in a pass (%s); continuing with %s",
                    was, reason, cure)  # fmt: skip
        return change

    def _check(self, reason: str, *, undone: bool) -> None:
        """Raise OutOfMemory if smaller slices would not help, or the step cannot be repeated."""
        most = self._images
        smaller = f"run.micro_batch={max(1, most // 2)}"
        cure = smaller if self._keeps_little else "run.recompute=true"
        if distributed.size() > 1:
            raise OutOfMemory(
                f"process {distributed.shard().rank} of {distributed.size()} ran out of memory "
                f"with {most} images in a pass ({reason}). A process cannot repeat a step "
                f"without the others: set {cure}; continue a run with --resume --set {cure}",
                undone=False,
            )
        if not undone:
            raise OutOfMemory(
                f"out of memory ({reason}) after an update had begun, which cannot be undone. "
                f"The newest checkpoint is intact: continue with --resume --set {cure}",
                undone=False,
            )
        if self._whole and self._keeps_little:
            raise OutOfMemory(
                f"out of memory ({reason}) with {self._most} images in a pass that cannot be "
                "split, since batch norm computes its statistics over all of them: use a smaller "
                "batch, a network with another norm, or backbone.density.batch_norm = "
                "running_stats if it was a chain's"
            )
        if most < 2 and self._keeps_little:
            raise OutOfMemory(
                f"out of memory ({reason}) with {most} image(s) in a pass, and smaller passes "
                "would not help: use a smaller batch, a smaller network or a larger device"
            )


_ACTIVE: ContextVar[MicroBatch | None] = ContextVar("micro_batch", default=None)


def can_recompute(network: nn.Module) -> bool:
    """Whether a network supports `recomputes`; those of this library declare it."""
    return bool(getattr(network, "recomputes", False))


def checkpointed(
    part: Callable[[Tensor], Tensor], x: Tensor, of: nn.Module, *, draws: bool = True
) -> Tensor:
    """part(x) with activation checkpointing: the backward pass recomputes all but x.

    The second pass has the modes, and the group of processes, of the first: on a GPU the backward
    pass runs in a thread of torch's, which knows neither. `draws`: whether it uses generators.
    """
    now = copy_context()
    return checkpoint(  # type: ignore[no-any-return]
        lambda x: now.copy().run(part, x), x, use_reentrant=False, preserve_rng_state=draws,
        context_fn=lambda: (nullcontext(), SameModes(of)),
    )  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on a device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def microbatched(part: Callable[[Tensor], Tensor], x: Tensor, of: nn.Module) -> Tensor:
    """A network's pass, or a part of one, with the current micro-batch."""
    if torch.compiler.is_compiling():
        return part(x)
    micro = _ACTIVE.get()
    return part(x) if micro is None else micro.microbatched(part, x, of)


def cuts(n: int) -> bool:
    """Whether the current micro-batch would split a pass of n images."""
    micro = _ACTIVE.get()
    return micro is not None and micro.cuts(n)


def recomputes() -> bool:
    """Whether the current pass should use activation checkpointing."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    micro = _ACTIVE.get()
    return micro is not None and micro.recomputes


def retry_on_oom(work: Callable[[], T], rng: Generator | None = None) -> T:
    """Work that can be repeated, with the current micro-batch or a new one."""
    return (_ACTIVE.get() or MicroBatch()).retry_on_oom(work, rng)
