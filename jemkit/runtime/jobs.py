"""Processes that work on one evaluation together, through its ledger."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jemkit.errors import JemkitError
from jemkit.runtime.ledger import Shard


@contextmanager
def helpers(count: int, work: Callable[..., None], *given: Any) -> Iterator[Callable[[], bool]]:
    """`count` - 1 processes that run work(*given, shard), beside the caller, who is shard 0.

    Yields what to call while waiting for them: it raises where one of them has failed. They end
    with the caller.
    """
    spawn = multiprocessing.get_context("spawn")
    running = [
        spawn.Process(target=_work, args=(work, *given, Shard(i, count)), daemon=True)
        for i in range(1, count)
    ]

    def failed() -> bool:
        for process in running:
            if process.exitcode not in (None, 0):
                raise JemkitError(
                    f"one of the {count} processes ended with exit code {process.exitcode}; what "
                    "is finished is kept, and the same command goes on from there"
                )
        return False

    try:
        for process in running:
            process.start()
        yield failed
    finally:
        for process in running:
            if process.is_alive():
                process.terminate()
                process.join()


def _work(work: Callable[..., None], *given: Any) -> None:
    """The caller alone hears ^C, which a terminal sends to all; it ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work(*given)
