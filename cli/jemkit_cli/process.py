"""The process of a command: how it handles ^C before, during and after its work, and its output.

This module imports only small parts of the standard library, since it runs before everything else.
"""

import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, TextIO

INTERRUPTED = 130

_working = False  # whether a command is running, which ends its work by itself
_interrupted = False  # whether SIGINT was received
_end_requested = False  # whether SIGINT was the signal that ended the command's work


def listen() -> Callable[[], None]:
    """Handle SIGINT from now on; the returned function restores the previous handler.

    Before a command begins, after it ends and during an import, where an exception could be lost or
    converted, the process ends at once. Otherwise KeyboardInterrupt is raised; a second SIGINT ends
    the process at once. If SIGINT is ignored it stays ignored.
    """
    global _interrupted, _end_requested
    _interrupted = _end_requested = False
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return lambda: None
    before, hook = signal.signal(signal.SIGINT, interrupt), sys.unraisablehook
    sys.unraisablehook = _unraisable

    def restore() -> None:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook

    return restore


def interrupt(_: int, frame: FrameType | None) -> None:
    """The handler of SIGINT."""
    global _interrupted
    again, _interrupted = _interrupted, True
    if again or not _working or _importing(frame):
        leave()
    raise KeyboardInterrupt


def interrupted() -> bool:
    """Whether SIGINT was received, even if its exception was converted to another one."""
    return _interrupted


def request_end(number: int) -> None:
    """A signal was received on which the command ends its work by itself."""
    global _end_requested
    _end_requested = number == signal.SIGINT


def end_requested() -> bool:
    """Whether that signal was ^C."""
    return _end_requested


class Working:
    """A command is running inside the block."""

    def __enter__(self) -> None:
        global _working
        _working = True
        PULSE.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        global _working
        _working = False
        PULSE.stop()


def leave() -> None:
    """End the process at once, with one line."""
    PULSE.stop()
    with suppress(AttributeError, OSError, RuntimeError, ValueError):  # closed, or in use
        sys.stdout.flush()
    try:
        os.write(2, f"{speaker()}interrupted\n".encode())
    finally:
        os._exit(INTERRUPTED)


def speaker() -> str:
    """The rank of this process, if it is not the first of several."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank} of {os.environ.get('WORLD_SIZE')}: "


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _unraisable(what: Any) -> None:
    """Handles an exception that cannot propagate, in a destructor: ^C must not be lost there."""
    if issubclass(what.exc_type, KeyboardInterrupt):
        leave()
    sys.__unraisablehook__(what)


SILENCE = 2.0
"""Seconds without output on a terminal, after which a command shows the elapsed time."""
ERASED = b"\r\x1b[K"


class Pulse:
    """The elapsed time of a command, in a line that the next output replaces.

    Only on a terminal, and not while a progress bar is shown.
    """

    def __init__(self) -> None:
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._spoke = self._began = time.monotonic()
        self._shown = False

    def spoken(self) -> None:
        """Output follows: remove the line."""
        with self._lock:
            self._spoke = time.monotonic()
            if self._shown:
                self._shown = False
                with suppress(OSError):
                    os.write(2, ERASED)

    def beat(self, now: float) -> None:
        """Show the elapsed time if there has been no output until `now`."""
        with self._lock:
            if now - self._spoke > SILENCE:
                self._shown = True
                with suppress(OSError):
                    os.write(2, ERASED + f"working, {now - self._began:.0f} s".encode())

    def start(self) -> None:
        buffer: Any = getattr(sys.stderr, "buffer", None)
        raw = getattr(buffer, "raw", buffer)
        if isinstance(raw, Output) and sys.stderr.isatty() and not speaker():
            self._ended.clear()
            self._spoke = self._began = time.monotonic()
            threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        self._ended.set()
        self.spoken()

    def _run(self) -> None:
        while not self._ended.wait(0.5):
            self.beat(time.monotonic())


PULSE = Pulse()
GONE = (errno.EPIPE, errno.EIO)
"""Errors of a stream whose reader has ended or whose terminal is closed."""


class Output(io.FileIO):
    """A file descriptor whose reader may end: later output is dropped, and work continues."""

    def write(self, content: Any) -> int:
        PULSE.spoken()
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in GONE or (error.errno == errno.EIO and not self._terminal):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self.fileno())
            finally:
                os.close(nowhere)
            return len(content)

    _terminal = False

    @classmethod
    def of(cls, stream: TextIO) -> TextIO:
        """The same stream on this kind of descriptor, with replacements for other characters."""
        raw = cls(stream.fileno(), "w", closefd=False)
        raw._terminal = stream.isatty()
        unbuffered = bool(getattr(stream, "write_through", False))
        buffer: Any = raw if unbuffered else io.BufferedWriter(raw)
        return io.TextIOWrapper(
            buffer, stream.encoding, "backslashreplace", write_through=unbuffered,
            line_buffering=stream.isatty() or stream is sys.__stderr__,
        )  # fmt: skip


def open_streams() -> None:
    """Set up standard output and error for a command; streams that a caller replaced stay."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            setattr(sys, name, Output.of(stream))
