"""Waiting for something to happen, however slow the machine is."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SAFETY = 1800.0
"""Seconds after which a test has hung; nothing but a fault takes so long."""


def until(happened: Callable[[], T], what: str, shown: Callable[[], object] = lambda: "") -> T:
    """What `happened` gives as soon as it is true; a hang is told by `what` and `shown`."""
    end = time.monotonic() + SAFETY
    while not (value := happened()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {SAFETY:.0f} s for {what}; {shown()}")
        time.sleep(0.01)
    return value
