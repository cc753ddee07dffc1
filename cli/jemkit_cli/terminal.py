"""What all commands share: the registry with its warnings, errors, JSON, tables, progress."""

import errno
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import Parameter, Signature, signature
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer

from jemkit_cli import process
from jemkit_cli.printable import at_home, printable

if TYPE_CHECKING:
    from rich.console import Console

    from jemkit.config.registry import Registry

NoPlugins = Annotated[bool, typer.Option("--no-plugins", help="Use only jemkit's own parts.")]
P = ParamSpec("P")
USAGE, CONFIG, STOPPED, DATA, INTERRUPTED = 2, 3, 5, 6, process.INTERRUPTED


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """A command that reports a user's error as one message on stderr, without a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        show_notices()
        ended: BaseException | None = None
        try:
            with process.Working():
                command(*args, **{name: at_home(v) for name, v in kwargs.items()})
        except typer.Exit:
            raise
        except BaseException as error:
            code, message = _exit_of(error)
            if not code:
                raise
            if getattr(error, "reported", False):  # by rank 0
                raise typer.Exit(code) from None
            ended = error
        if ended is not None:  # outside of `except`, to free the tensors of the error's frames
            ended.__traceback__ = None
            if code in (INTERRUPTED, STOPPED):  # requested by the user
                end(message, code)
            fail(message, code)

    return run


def takes(
    options: Callable[..., object], *names: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a guarded command of a function whose first argument is made by `options`.

    The command has the parameters of `options`, or the given ones, followed by the others of the
    function.
    """
    known = signature(options).parameters
    shared = [known[name] for name in known if name in (names or known)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = signature(command).parameters.values()

        @guarded
        @wraps(command)
        def run(**given: Any) -> None:
            command(options(**{one.name: given.pop(one.name) for one in shared}), **given)

        parameters = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in (*shared, *own)]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


class _Notices(logging.Handler):
    """Shows warnings, and the messages of rank 0 about data, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or not process.speaker():
            print(printable(record.getMessage()), file=sys.stderr, flush=True)


def show_notices() -> None:
    """Let commands report their progress and the data that they found."""
    logger = logging.getLogger("jemkit")
    logging.getLogger("jemkit.data").setLevel(logging.INFO)
    if not any(isinstance(handler, _Notices) for handler in logger.handlers):
        logger.addHandler(_Notices())


def _exit_of(error: BaseException) -> tuple[int, str]:
    """The exit code and message of an error; 0 if it is a bug."""
    from jemkit.errors import JemkitError, OutOfMemory, Preempted, memory_ran_out

    if isinstance(error, KeyboardInterrupt) or process.interrupted():
        return INTERRUPTED, "interrupted"
    if isinstance(error, OutOfMemory):
        return error.exit_code, str(error)
    if isinstance(error, Exception) and (reason := memory_ran_out(error)):
        return OutOfMemory.exit_code, (
            f"out of memory ({reason}); end other programs, use fewer or smaller images, a "
            f"smaller batch or network, or a larger machine. Everything saved before is intact"
        )
    if isinstance(error, Preempted) and process.end_requested():
        return error.exit_code, f"interrupted{str(error).removeprefix('stopped')}"
    if isinstance(error, JemkitError):
        return error.exit_code, str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.filename is None and full:
        return DATA, f"the output, or a file, cannot be written: {error.strerror}; free some space"
    if isinstance(error, OSError) and error.filename is not None:
        hint = "; free some space and run the same command again, nothing is lost" if full else ""
        if isinstance(error, FileExistsError | NotADirectoryError):
            hint = "; a part of this path is a file or a broken link: give another path"
        return DATA, f"{error.filename}: {error.strerror}{hint}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        if not package.startswith("jemkit"):
            return CONFIG, f"a part of this command needs the package {package}: install it"
    return 0, ""


def fail(message: str, code: int) -> NoReturn:
    end(message, code, "error: ")


def end(message: str, code: int, before: str = "") -> NoReturn:
    """End a command with a line on standard error."""
    sys.stdout.flush()
    print(f"{before}{process.speaker()}{printable(message)}", file=sys.stderr, flush=True)
    raise typer.Exit(code)


def installed_parts(*, third_party: bool) -> "Registry":
    """All parts, with one warning for each plug-in that was skipped."""
    from jemkit.config.registry import installed

    registry = installed(third_party=third_party)
    for fault in () if process.speaker() else registry.faults:
        whose = f"plug-in {fault.plugin!r} of {fault.distribution} {fault.version}".rstrip()
        reason = " ".join(fault.reason.split())
        print(f"warning: {printable(f'{whose} is skipped: {reason}')}", file=sys.stderr, flush=True)
    for notice in () if process.speaker() else registry.slow:
        print(
            f"note: {printable(notice)}; each command waits for that", file=sys.stderr, flush=True
        )
    return registry


def say(text: str) -> None:
    """Print a line unchanged, whatever the width of the terminal."""
    print(printable(text), flush=True)


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Print valid JSON; a non-finite number becomes null."""
    from jemkit.metrics.figures import finite

    print(json.dumps(finite(value), allow_nan=False, indent=indent), flush=True)


def console() -> "Console":
    """Standard output; without colours if it is not a terminal or NO_COLOR is set."""
    from rich.console import Console

    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=140)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    above = Text(printable(title)) if title else None
    table = Table(box=box.SIMPLE, title=above, title_justify="left")
    for column in columns:
        table.add_column(Text(printable(column)))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console().print(table)


STOPPING = b"\nstopping, what is done is kept; once more ends at once\n"
TWICE = 2.0
"""Seconds in which torchrun repeats a ^C that the terminal already sent to its processes."""


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT, SIGTERM or SIGHUP was received; a second SIGINT ends the command at once.

    A closed terminal sends SIGHUP. Under nohup it is ignored, and stays ignored.
    """
    came: list[float] = []
    twice = TWICE if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if came and number == signal.SIGINT and now >= came[0] + twice:
            process.interrupt(number, frame)
        came.append(now)
        if len(came) == 1:
            process.request_end(number)
            with suppress(OSError):  # the terminal may be closed
                os.write(2, STOPPING)

    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
