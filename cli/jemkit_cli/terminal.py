"""What every command shares: the registry with its warnings, errors, JSON, tables, progress."""

import errno
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from jemkit.registry import Registry

P = ParamSpec("P")
USAGE, DATA, INTERRUPTED = 2, 6, 130


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose user's mistakes end it by one message on stderr, without a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        show_notices()
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)
        except BrokenPipeError:  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            if error.filename is None:
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            hint = "; make room and run the same command again, nothing is lost" if full else ""
            fail(f"{error.filename}: {error.strerror}{hint}", DATA)
        except Exception as error:
            from jemkit.errors import JemkitError

            if not isinstance(error, JemkitError):
                raise
            fail(str(error), error.exit_code)

    return run


class _Notices(logging.Handler):
    """Shows what is said of data, on standard error, by the first process."""

    def emit(self, record: logging.LogRecord) -> None:
        if not _speaker():
            print(record.getMessage(), file=sys.stderr, flush=True)


def show_notices() -> None:
    """Have commands say which data they found."""
    logger = logging.getLogger("jemkit.data")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Notices) for handler in logger.handlers):
        logger.addHandler(_Notices())


def fail(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {_speaker()}{message}", file=sys.stderr, flush=True)
    raise typer.Exit(code)


def _speaker() -> str:
    """Which process of several it is, but for the first one."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank} of {os.environ.get('WORLD_SIZE')}: "


def installed_parts(*, third_party: bool) -> "Registry":
    """All parts; one warning for each plug-in that was left out."""
    from jemkit.registry import installed

    registry = installed(third_party=third_party)
    for fault in () if _speaker() else registry.faults:
        whose = f"plug-in {fault.plugin!r} of {fault.distribution} {fault.version}".rstrip()
        reason = " ".join(fault.reason.split())
        print(f"warning: {whose} is skipped: {reason}", file=sys.stderr, flush=True)
    return registry


def say(text: str) -> None:
    """A line as it is, whatever the terminal's width."""
    print(text, flush=True)


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Valid JSON; a number that is not finite has none and becomes null."""
    from jemkit.record import finite

    print(json.dumps(finite(value), allow_nan=False, indent=indent), flush=True)


def console() -> "Console":
    """Standard output; without colours where it is no terminal or NO_COLOR is set."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=140)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE, title=title or None, title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


STOPPING = b"\nstopping, what is done is kept; once more ends at once\n"
TWICE = 2.0
"""Seconds in which torchrun passes on a ^C that its processes got from the terminal already."""


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came; a second SIGINT raises KeyboardInterrupt."""
    came: list[float] = []
    twice = TWICE if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def handle(number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if came and number == signal.SIGINT and now >= came[0] + twice:
            raise KeyboardInterrupt
        came.append(now)
        if len(came) == 1:
            os.write(2, STOPPING)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
