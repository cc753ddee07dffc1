"""Times that include the work of the device: a GPU's host returns before the work is done."""

import time
from collections.abc import Callable
from typing import Any

import torch


def settle(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds of steps, read when the host synchronises with the device anyway.

    On a GPU the host may be ahead, so the seconds of a single step are those of its launch. The
    time from the first of several steps to the reading after the last is exact.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._first: float | None = None  # when the first step since the last reading began
        self._newest = 0.0

    def begin(self) -> None:
        self._newest = self._clock()
        if self._first is None:
            self._first = self._newest

    def drop(self) -> None:
        """The last step failed: leave it out of the reading."""
        if self._first is not None:
            self._first += self._clock() - self._newest

    def read(self) -> float:
        """Seconds of steps since the last reading; call it after synchronising with the device."""
        first, self._first = self._first, None
        return 0.0 if first is None else self._clock() - first


PATIENCE = 0.2
"""Seconds for which an operation is repeated; the fastest time counts, since other work can only
make one slower."""


def fastest(call: Callable[[], Any], device: torch.device, patience: float = PATIENCE) -> float:
    """Seconds of the fastest of several calls, at least three, after one warm-up call."""
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < patience:
        times.append(elapsed(call, device))
    return min(times)


def elapsed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, including the device's work."""
    settle(device)
    began = time.perf_counter()
    call()
    settle(device)
    return time.perf_counter() - began
