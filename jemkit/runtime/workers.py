"""Processes that torchrun started, each with its share of one evaluation or one drawing.

What they compute they share through a ledger on disk; here they only begin and end together.
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
"""Seconds in which torchrun, where one process has ended, stops the others."""


@contextmanager
def joined(device: str) -> Iterator[Shard]:
    """Meet the others, each on a device of its own; this process's share of the work."""
    with distributed.group(device):
        yield distributed.shard()


def begun(prepare: Callable[[], T]) -> T | None:
    """What `prepare` gives, in every process; where it fails the first one alone says why.

    The first one tries before the others do, and None is what they get where it has failed.
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
        raise JemkitError(f"the first process of the group is gone: {error}") from None


def met(poll: Callable[[], None] = lambda: None) -> None:
    """Wait until every process is here; `poll` is asked where one of them never comes."""
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
            f"another process of the group is gone: {error}; what is finished is kept, and the "
            "same command goes on from there"
        ) from None
