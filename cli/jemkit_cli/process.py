"""The process of a command: what ^C does before, during and after it, and where its output goes.

Nothing here imports more than the standard library's smallest parts: it runs before all else.
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

_working = False  # whether a command is under way, which ends its work by itself
_interrupted = False  # whether SIGINT came
_end_requested = False  # whether it was SIGINT that asked the command to end its work


def listen() -> Callable[[], None]:
    """Hear SIGINT from now on; what it gives back puts the handler before it in its place.

    Before a command has begun, after it has ended and amid an import, where an exception could be
    lost or turned into another one, the process ends at once. In between KeyboardInterrupt is
    raised; a second SIGINT ends the process at once. Who ignores SIGINT goes on ignoring it.
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
    """Whether SIGINT came, though what it raised may have become another exception."""
    return _interrupted


def request_end(number: int) -> None:
    """A signal came on which the command ends its work by itself."""
    global _end_requested
    _end_requested = number == signal.SIGINT


def end_requested() -> bool:
    """Whether that signal was a ^C."""
    return _end_requested


class Working:
    """A command is under way inside the block."""

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
    """End the process now, with one line."""
    PULSE.stop()
    with suppress(AttributeError, OSError, RuntimeError, ValueError):  # closed, or in use
        sys.stdout.flush()
    try:
        os.write(2, f"{speaker()}interrupted\n".encode())
    finally:
        os._exit(INTERRUPTED)


def speaker() -> str:
    """Which process of several it is, but for the first one."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank} of {os.environ.get('WORLD_SIZE')}: "


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _unraisable(what: Any) -> None:
    """An exception where nobody can catch it, in a destructor; a ^C is not lost there."""
    if issubclass(what.exc_type, KeyboardInterrupt):
        leave()
    sys.__unraisablehook__(what)


SILENCE = 2.0
"""Seconds without a word on a terminal, after which a command gives a sign of life."""
ERASED = b"\r\x1b[K"


class Pulse:
    """How long a command has worked, in a line that what it says next replaces.

    On a terminal alone; where a bar moves, nobody is silent.
    """

    def __init__(self) -> None:
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._spoke = self._began = time.monotonic()
        self._shown = False

    def spoken(self) -> None:
        """Somebody writes now: take the line away."""
        with self._lock:
            self._spoke = time.monotonic()
            if self._shown:
                self._shown = False
                with suppress(OSError):
                    os.write(2, ERASED)

    def beat(self, now: float) -> None:
        """Show the time since the command began, where it has been silent until `now`."""
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
"""How writing fails where a reader has ended or a terminal is closed."""


class Output(io.FileIO):
    """A file descriptor whose reader may end: what is written later is dropped, work goes on."""

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
        """The same stream, by a descriptor of this kind and with a replacement for each character
        that its encoding lacks."""
        raw = cls(stream.fileno(), "w", closefd=False)
        raw._terminal = stream.isatty()
        unbuffered = bool(getattr(stream, "write_through", False))
        buffer: Any = raw if unbuffered else io.BufferedWriter(raw)
        return io.TextIOWrapper(
            buffer, stream.encoding, "backslashreplace", write_through=unbuffered,
            line_buffering=stream.isatty() or stream is sys.__stderr__,
        )  # fmt: skip


def open_streams() -> None:
    """Standard output and error as a command needs them; what somebody put in their place stays."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            setattr(sys, name, Output.of(stream))
