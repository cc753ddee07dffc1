"""Processes started by torchrun that share one evaluation or one sampling.

They exchange results through the work cache on disk; here they only start and end together.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from jemkit.errors import JemkitError
from jemkit.runtime import distributed
from jemkit.runtime.work_cache import Shard

T = TypeVar("T")
GRACE = 5.0
"""Seconds within which torchrun stops the other processes after one has ended."""


@contextmanager
def joined(device: str) -> Iterator[Shard]:
    """Join the other processes, each on its own device; returns the share of this process."""
    with distributed.group(device):
        yield distributed.shard()


def begun(prepare: Callable[[], T]) -> T | None:
    """The result of `prepare` in every process; if it fails, rank 0 alone reports it.

    Rank 0 runs it first; if it fails there, the others get None.
    """
    me = distributed.shard()
    if me.size == 1:
        return prepare()
    if me.rank:
        return prepare() if _heard() else None
    well = False
    try:
        found = prepare()
        well = True
    finally:
        distributed.tell({"do": "begin" if well else "end"})
    return found


def _heard() -> bool:
    try:
        return bool(distributed.heard()["do"] == "begin")
    except RuntimeError as error:
        raise JemkitError(f"rank 0 was lost: {error}") from None


def met(poll: Callable[[], None] = lambda: None) -> None:
    """Wait until every process arrives; `poll` is called while waiting."""
    if distributed.shard().size == 1:
        return
    try:
        distributed.gather({})
    except RuntimeError as error:
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            poll()
            time.sleep(0.05)
        raise JemkitError(
            f"another process was lost: {error}; finished work is saved, and the same command "
            f"continues"
        ) from None
