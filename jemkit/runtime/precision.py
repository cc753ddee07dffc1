"""Devices, precision and determinism, which methods need not know."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar

import torch

from jemkit.errors import ConfigError

T = TypeVar("T")

Precision = Literal["fp32", "tf32", "bf16"]

JUDGED_IN: Precision = "fp32"
"""The precision of every figure: in validation, in the final evaluation and in `evaluate`.

It does not depend on the precision of training: `judging` sets it, and the protocol contains it.
"""

Layout = Literal["auto", "yes", "no"]
"""Memory format of weights; `auto` is a fixed rule of network and device."""


def device_of(name: str) -> torch.device:
    """auto is CUDA if available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use cpu or auto")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r}: expected auto, cpu or cuda") from None


def memory_of(device: torch.device) -> int:
    """Bytes of a device's memory; a huge number if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return 2**46


def slow_precision(precision: Precision, device: torch.device) -> str | None:
    """A warning if the device computes in bf16 only by emulation; None otherwise."""
    if precision != "bf16":
        return None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if native:
        return None
    return (
        f"run.precision: bf16 is emulated on this {device.type.upper()}, which has no instructions "
        "for it, and is many times slower than fp32; use --set run.precision=fp32"
    )


@contextmanager
def as_trained(
    device_type: str, precision: Precision, *, deterministic: bool, threads: int | None,
    tuned: bool = True,
) -> Iterator[None]:  # fmt: skip
    """Torch's settings, and autocast, as a run has them while it trains."""
    narrow = torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16")
    with (
        numerics(precision=precision, deterministic=deterministic, threads=threads, tuned=tuned),
        narrow,
    ):
        yield


def judging(
    device: torch.device, *, deterministic: bool = False, threads: int | None = None
) -> AbstractContextManager[None]:
    """Torch's settings for every figure, also inside a caller's autocast.

    cuDNN does not try its algorithms out: the batches of an attack have many sizes.
    """
    return as_trained(
        device.type, JUDGED_IN, deterministic=deterministic, threads=threads, tuned=False
    )


@contextmanager
def numerics(
    *, precision: Precision = "fp32", deterministic: bool = False, threads: int | None = None,
    tuned: bool = True,
) -> Iterator[None]:  # fmt: skip
    """Torch's settings for a run, restored afterwards; `tuned`: cuDNN tries its algorithms out."""
    strict, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    threads_before = torch.get_num_threads()
    with _float32(precision):
        torch.backends.cudnn.benchmark = tuned and not deterministic
        _be_deterministic(deterministic)
        torch.set_num_threads(threads or threads_before)
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = benchmark
            _be_deterministic(strict)
            torch.set_num_threads(threads_before)


def _switches() -> list[Any]:
    """What holds torch's `fp32_precision` settings: the general one, a GPU's, a CPU's."""
    b: Any = torch.backends
    return [b, b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn,
            b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn]  # fmt: skip


@contextmanager
def _float32(precision: Precision) -> Iterator[None]:
    """Set how float32 is multiplied: in tf32 on a GPU if requested, else in full.

    The older `float32_matmul_precision` and `cudnn.allow_tf32` are set too: torch raises when they
    contradict the newer settings, and a model may read them. Afterwards every operation has its
    value again, as a setting of its own.
    """
    gpu = "tf32" if precision == "tf32" else "ieee"
    before = [switch.fp32_precision for switch in _switches()]
    matmul = _consistent(torch.get_float32_matmul_precision)
    convolution = _consistent(lambda: torch.backends.cudnn.allow_tf32)
    tf32 = precision == "tf32"
    _set_float32("high" if tf32 else "highest", tf32, ["ieee", *[gpu] * 3, *["ieee"] * 3])
    try:
        yield
    finally:
        _set_float32(matmul, convolution, before)


def _set_float32(matmul: str | None, convolution: bool | None, values: list[str]) -> None:
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if convolution is not None:
        torch.backends.cudnn.allow_tf32 = convolution
    for switch, value in zip(_switches(), values, strict=True):
        switch.fp32_precision = value


def _consistent(read: Callable[[], T]) -> T | None:
    """An older setting; None if the newer ones contradict it."""
    try:
        return read()
    except RuntimeError:
        return None


def _be_deterministic(on: bool) -> None:
    """Set torch's flag only if it differs: setting it imports the whole compiler."""
    if torch.are_deterministic_algorithms_enabled() != on:
        torch.use_deterministic_algorithms(on)
