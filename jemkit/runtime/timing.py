"""Time that includes the device's work: a GPU's host goes on before the work is done."""

import time
from collections.abc import Callable
from typing import Any

import torch

Clock = Callable[[], float]
"""Seconds since some moment."""


def settle(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds of steps, read where the host waits for the device anyway.

    On a GPU the host may be ahead, so the seconds of a single step are those of its launch. Those
    from the first of some steps to the reading after the last of them are exact.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._first: float | None = None  # when the first step since the last reading began
        self._newest = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._newest = self._clock()
        if self._first is None:
            self._first = self._newest

    def drop(self) -> None:
        """The step that began last failed: it is no part of what is read."""
        if self._first is not None:
            self._first += self._clock() - self._newest

    def read(self) -> float:
        """Seconds since the last reading, of steps alone; call it once the device is done."""
        first, self._first = self._first, None
        return 0.0 if first is None else self._clock() - first


PATIENCE = 0.2
"""Seconds that an operation is repeated for; the fastest time counts, since nothing but other
work makes one slower."""


def fastest(
    call: Callable[[], Any],
    device: torch.device,
    patience: float = PATIENCE,
    clock: Clock = time.perf_counter,
) -> float:
    """Seconds of the fastest of some calls, three at the least, after one to warm up."""
    call()
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < 3 or time.perf_counter() - began < patience:
        found.append(elapsed(call, device, clock))
    return min(found)


def elapsed(
    call: Callable[[], Any], device: torch.device, clock: Clock = time.perf_counter
) -> float:
    """Seconds of one call, until the device has done it."""
    settle(device)
    began = clock()
    call()
    settle(device)
    return clock() - began
