"""Processes that work on one evaluation together, through its ledger."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, NoReturn

from jemkit.errors import JemkitError, OutOfMemory, memory_ran_out
from jemkit.runtime.ledger import Shard

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a terminal or a scheduler sends to every process of a command; the first one answers."""


@contextmanager
def helpers(count: int, work: Callable[..., None], *given: Any) -> Iterator[Callable[[], bool]]:
    """`count` - 1 processes that run work(*given, shard), beside the caller, who is shard 0.

    Yields what to call while waiting for them: it raises where one of them has failed. They end
    with the caller, however it ends.
    """
    spawn = multiprocessing.get_context("spawn")
    running: list[BaseProcess] = [
        spawn.Process(target=_work, args=(work, *given, Shard(i, count)), daemon=True)
        for i in range(1, count)
    ]

    def failed() -> bool:
        for process in running:
            if process.exitcode not in (None, 0):
                _tell(process.exitcode, count)
        return False

    try:
        with _deaf():
            for process in running:
                process.start()
        yield failed
    finally:
        for process in running:
            if process.pid is not None:
                process.kill()
                process.join()


def _tell(code: int | None, count: int) -> NoReturn:
    kept = "what is finished is kept, and the same command goes on from there"
    if code == OutOfMemory.exit_code:
        raise OutOfMemory(
            f"one of the {count} processes ran out of memory, see above; take fewer --jobs or a "
            f"smaller --batch-size. {kept.capitalize()}"
        )
    told = f"ended with exit code {code}"
    if code == -signal.SIGKILL:
        told = "was killed, as the system does where memory runs out"
    raise JemkitError(f"one of the {count} processes {told}; {kept}")


@contextmanager
def _deaf() -> Iterator[None]:
    """Signals wait until the block has ended; processes that it starts never get them.

    The tracker that the first of them needs is started before: starting it unblocks signals.
    """
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(work: Callable[..., None], *given: Any) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(*given)
    except Exception as error:
        reason = memory_ran_out(error)
        if not isinstance(error, JemkitError) and not reason:
            raise
        told = str(error) if isinstance(error, JemkitError) else f"out of memory ({reason})"
        print(f"error: process {given[-1].rank}: {told}", file=sys.stderr, flush=True)
        code = OutOfMemory.exit_code if reason else getattr(error, "exit_code", 1)
        raise SystemExit(code) from None


def _end_with_parent() -> None:
    """A parent that was killed closes the pipe that this waits for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
