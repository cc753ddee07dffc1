"""Context managers for a model's modes and torch's random state; each restores the previous one."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNormMode = Literal["batch_stats", "running_stats", "released"]
"""How batch norm behaves while sampling.

By batch statistics without updating the running ones, by the running statistics, or in plain train
mode as in the released code.
"""


def eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Eval mode: running statistics, no dropout."""
    return _training(model, on=False)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put torch's global generators back, which a model may draw from and pyautoattack seeds."""
    devices = range(torch.cuda.device_count())  # pyautoattack seeds CUDA's even for work on the CPU
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        yield


@contextmanager
def seeded_random_state(rng: Generator) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of a generator's device from it, and put them
    back: dropout and stochastic depth draw from them."""
    devices = [rng.device] if rng.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        if devices:
            torch.cuda.set_rng_state(rng.get_state(), rng.device)
        torch.set_rng_state(Generator().manual_seed(rng.initial_seed()).get_state())
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient, so that a chain keeps no graph for them."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextmanager
def frozen_batch_stats(model: nn.Module) -> Iterator[None]:
    """Do not update running statistics; in train mode batch norm still normalises by the batch."""
    norms = [m for m in batch_norms(model) if m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def frozen_batch_norm(model: nn.Module) -> Iterator[None]:
    """Batch norm in eval mode: it normalises by its running statistics, and does not update them.

    Its affine parameters still require a gradient.
    """
    with ExitStack() as stack:
        for norm in batch_norms(model):
            stack.enter_context(_training(norm, on=False))
        yield


@contextmanager
def sampling_mode(model: nn.Module, batch_norm: BatchNormMode) -> Iterator[None]:
    """The model as a chain uses it: frozen weights, no dropout, batch norm as requested."""
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(_training(model, on=batch_norm == "released"))
        if batch_norm == "batch_stats":
            stack.enter_context(frozen_batch_stats(model))
            for norm in batch_norms(model):
                stack.enter_context(_training(norm, on=True))
        yield


class SameModes:
    """A block, entered any number of times, in which a model has its present modes.

    It is for a recomputed pass, which must not update batch norm a second time. Buffers are
    replaced by copies and not written back, since other passes may need them unchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._now = self._then = _modes(self._modules)
        self._learn = [m for m in batch_norms(model) if m.training and m.track_running_stats]
        self._buffers: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self._then = _modes(self._modules)
        _set_modes(self._now)
        self._buffers = [dict(norm._buffers) for norm in self._learn]
        for norm, buffers in zip(self._learn, self._buffers, strict=True):
            norm._buffers.update({k: None if t is None else t.clone() for k, t in buffers.items()})

    def __exit__(self, *raised: object) -> None:
        for norm, buffers in zip(self._learn, self._buffers, strict=True):
            norm._buffers.update(buffers)
        _set_modes(self._then)


_Mode = tuple[nn.Module, bool, bool]


def _modes(modules: list[nn.Module]) -> list[_Mode]:
    """For each module: whether it trains, and whether it tracks statistics."""
    return [(m, m.training, isinstance(m, _BatchNorm) and m.track_running_stats) for m in modules]


def _set_modes(modes: list[_Mode]) -> None:
    for module, training, tracking in modes:
        module.training = training
        if isinstance(module, _BatchNorm):
            module.track_running_stats = tracking


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The modules that normalise by batch statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


@contextmanager
def _training(model: nn.Module, *, on: bool) -> Iterator[None]:
    modes = _modes([*model.modules()])
    model.train(on)
    try:
        yield
    finally:
        _set_modes(modes)
