"""Time that includes the device's work: a GPU's host goes on before the work is done."""

import time
from collections.abc import Callable

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
