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
    return torch.device(name)


def memory_of(device: torch.device) -> int:
    """Bytes of a device's memory; a huge number if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return 2**46


@contextmanager
def as_trained(
    device_type: str, precision: Precision, *, deterministic: bool, threads: int | None
) -> Iterator[None]:
    """Torch's settings, and autocast, as a run has them while it trains."""
    narrow = torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16")
    with numerics(precision=precision, deterministic=deterministic, threads=threads), narrow:
        yield


def judging(
    device: torch.device, *, deterministic: bool = False, threads: int | None = None
) -> AbstractContextManager[None]:
    """Torch's settings for every figure, also inside a caller's autocast."""
    return as_trained(device.type, JUDGED_IN, deterministic=deterministic, threads=threads)


@contextmanager
def numerics(
    *, precision: Precision = "fp32", deterministic: bool = False, threads: int | None = None
) -> Iterator[None]:
    """Torch's settings for a run, restored afterwards."""
    strict, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    threads_before = torch.get_num_threads()
    with _float32(precision):
        torch.backends.cudnn.benchmark = not deterministic
        _be_deterministic(deterministic)
        torch.set_num_threads(threads or threads_before)
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = benchmark
            _be_deterministic(strict)
            torch.set_num_threads(threads_before)


Switch = tuple[str, str]
"""Backend and operation of one of torch's `fp32_precision` settings in `torch.backends`.

("cuda", "all") is `cudnn.fp32_precision`, ("cuda", "conv") is `cudnn.conv.fp32_precision`. An unset
one follows its backend's "all", and that follows ("generic", "all").
"""

GENERIC: Switch = ("generic", "all")
BACKENDS: tuple[Switch, ...] = (("cuda", "all"), ("mkldnn", "all"))
OPERATIONS: tuple[Switch, ...] = tuple(
    (backend, op) for backend, _ in BACKENDS for op in ("matmul", "conv", "rnn")
)


def read_switch(switch: Switch) -> str:
    """The value of a setting: its own, or that of the one that it follows."""
    return str(_holder(switch).fp32_precision)


def write_switch(switch: Switch, value: str) -> None:
    """Set one of these; "none" lets it follow."""
    _holder(switch).fp32_precision = value


def _holder(switch: Switch) -> Any:
    """The part of `torch.backends` whose `fp32_precision` a switch is."""
    backend, op = switch
    if switch == GENERIC:
        return torch.backends
    if switch == ("cuda", "matmul"):
        return torch.backends.cuda.matmul
    whole = torch.backends.cudnn if backend == "cuda" else torch.backends.mkldnn
    return whole if op == "all" else getattr(whole, op)


@contextmanager
def _float32(precision: Precision) -> Iterator[None]:
    """Set how float32 is multiplied: in tf32 on a GPU if requested, else in full.

    A setting that follows another one still does so afterwards, since an operation's setting is
    written only if it was set. The older `float32_matmul_precision` and `cudnn.allow_tf32` are kept
    consistent if they were, since torch raises when the two differ, and a model may read them. For
    that, a GPU's convolutions, which are tf32 by default, are set to tf32 explicitly afterwards.
    """
    generic, older = read_switch(GENERIC), _consistent(torch.get_float32_matmul_precision)
    convolution = _consistent(lambda: torch.backends.cudnn.allow_tf32)
    backends = _own(BACKENDS, (GENERIC,))
    operations = _own(OPERATIONS, (GENERIC, *BACKENDS))
    wanted = {"cuda": "tf32" if precision == "tf32" else "ieee", "mkldnn": "ieee"}
    try:
        if older is not None:  # it sets "matmul" of both backends
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        if convolution is not None:
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
        write_switch(GENERIC, "ieee")
        for switch in (*BACKENDS, *operations):
            write_switch(switch, wanted[switch[0]])
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        if convolution is not None:
            torch.backends.cudnn.allow_tf32 = convolution
        for switch, value in {**operations, **backends}.items():
            write_switch(switch, value)
        write_switch(GENERIC, generic)


def _own(switches: tuple[Switch, ...], above: tuple[Switch, ...]) -> dict[Switch, str]:
    """The settings that are set themselves, found by changing those above; these stay changed.

    Convolutions of a GPU that follow are left out: with "none" they would lose torch's default,
    which is tf32. A matmul that follows is "none".
    """
    readings = []
    for value in ("ieee", "tf32"):
        for switch in above:
            write_switch(switch, value)
        readings.append([read_switch(switch) for switch in switches])
    own = {s: a if a == b else "none" for s, a, b in zip(switches, *readings, strict=True)}
    return {s: v for s, v in own.items() if v != "none" or s[1] in ("all", "matmul")}


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
