"""Third-party plug-ins: their code is contained, and a new one is first imported in a child
process.

A plug-in may end the interpreter, keep it from ending or never finish its import. So a new or
changed one is imported by a child process first, and the result is cached. Exceptions that it
raises are reported again at each import.
"""

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from jemkit.errors import memory_ran_out
from jemkit.runtime.files import cache_folder, read_json, write_json

IMPORT, END, LAST = 60, 10, 600  # seconds: to import a plug-in, to end after that, and in total
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST = 5000  # limit on the files of a plug-in that are examined for changes


class Refused(Exception):
    """The exception of a plug-in, as a line."""


class NoRoom(Refused):
    """It raised because memory ran out, which is not the plug-in's fault."""


def error_line(error: BaseException) -> str:
    """An error as one line, though its message may fail in turn."""
    try:
        text = str(error)
    except BaseException:
        text = "(without a message that can be shown)"
    return f"{type(error).__name__}: {text}"[:500]


@contextmanager
def contained() -> Iterator[None]:
    """Run a plug-in's code: exceptions become Refused, its output goes to standard error.

    A ^C of the user is still KeyboardInterrupt, and the command's signal handlers are restored.
    """
    came: list[int] = []
    reason, kind = "", Refused
    with ExitStack() as held:
        if threading.current_thread() is threading.main_thread():
            held.enter_context(_handlers(came))
        held.enter_context(_to_standard_error())
        try:
            yield
        except Refused:
            raise
        except BaseException as error:
            reason = error_line(error)
            kind = NoRoom if memory_ran_out(error) else Refused
    if came:
        raise KeyboardInterrupt
    if reason:
        raise kind(reason)


@contextmanager
def _handlers(came: list[int]) -> Iterator[None]:
    """Restore handlers of signals, and record each SIGINT that arrives meanwhile."""
    before = {number: signal.getsignal(number) for number in STOPS}
    interrupt = before[signal.SIGINT]

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if callable(interrupt):
            interrupt(number, frame)

    if callable(interrupt):
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that python did not install
                signal.signal(number, handler)


@contextmanager
def _to_standard_error() -> Iterator[None]:
    """Redirect standard output, of python and below it, to standard error."""
    streams = [stream for stream in {sys.stdout, sys.__stdout__} if stream is not None]

    def flush() -> None:
        for stream in streams:
            with suppress(OSError, ValueError):
                stream.flush()

    flush()
    saved = -1
    with suppress(OSError):  # closed descriptors have nothing to protect
        saved = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        flush()
        if saved >= 0:
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).fflush(None)
            os.dup2(saved, 1)
            os.close(saved)


class Guest(NamedTuple):
    """A third-party plug-in that is not imported yet."""

    entry: EntryPoint
    distribution: str
    version: str


class Verdict(NamedTuple):
    """Why a plug-in must not be imported, and whether this will be so the next time."""

    fault: str
    lasting: bool = True


def lethal(guests: Sequence[Guest]) -> list[str]:
    """For each plug-in why it must not be imported into this process; empty if it may."""
    paths = [cache_folder() / "plugins" / f"{_key(guest)}.json" for guest in guests]
    known = [_remembered(path) for path in paths]
    new = [i for i, fault in enumerate(known) if fault is None]
    if new and sys.executable:
        for i, verdict in zip(new, _probed([guests[i].entry for i in new]), strict=True):
            known[i] = fault = verdict.fault if verdict else None
            if verdict is None or not verdict.lasting:  # the next command probes again
                continue
            about = {"plugin": guests[i].entry.name, "distribution": guests[i].distribution}
            with suppress(OSError):  # without a cache it is probed each time
                paths[i].parent.mkdir(parents=True, exist_ok=True)
                write_json(paths[i], {**about, "fault": fault})
    return [fault or "" for fault in known]


def _remembered(path: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(read_json(path)["fault"])
    return None


def _key(guest: Guest) -> str:
    """A hash of what an import depends on: its files, and the installed packages."""
    entry = guest.entry
    about: list[Any] = [entry.name, entry.value, guest.distribution, guest.version]
    about += [sys.version, sys.executable]
    for folder in sys.path:
        with suppress(OSError):
            names = os.listdir(folder or ".")
            about.append(sorted(n for n in names if n.endswith((".dist-info", ".egg-info"))))
    about.append(_files(entry.value.partition(":")[0].strip().partition(".")[0]))
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def _files(module: str) -> list[tuple[str, int, int]]:
    """Name, size and time of every file of a module or package, which is not imported for it."""
    stamps: list[tuple[str, int, int]] = []
    with suppress(ImportError, ValueError, AttributeError, OSError):
        spec = find_spec(module)
        places = list(spec.submodule_search_locations or ()) if spec else []
        files = [Path(spec.origin)] if spec and spec.origin and not places else []
        for place in places:
            files += [p for p in sorted(Path(place).rglob("*")) if p.suffix in (".py", ".so")]
        for path in files[:MOST]:
            stat = path.stat()
            stamps.append((str(path), stat.st_size, stat.st_mtime_ns))
    return stamps


def _probed(entries: Sequence[EntryPoint]) -> list[Verdict | None]:
    """Import plug-ins in a child process; a verdict on each, None for those it did not reach."""
    read, write = os.pipe()
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    code = "import sys; from jemkit.config.probe_child import child; child(*sys.argv[1:])"
    request = json.dumps([(entry.name, entry.value) for entry in entries])
    running = subprocess.Popen(
        [sys.executable, "-P", "-c", code, request, str(write)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=[write], env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    os.close(write)
    ended = False
    try:
        with suppress(subprocess.TimeoutExpired):  # a plug-in has disabled its own alarm
            running.wait(LAST)
            ended = True  # possibly killed by another process, as when memory runs out
        lines = read_lines(read)
    finally:
        running.kill()
        running.wait()
        os.close(read)
        if running.stdin is not None:
            running.stdin.close()
    verdicts = [_verdict(*json.loads(line)) for line in lines]
    if running.returncode == -signal.SIGKILL and not ended:
        verdicts.append(Verdict("its import does not end"))
    return [*verdicts, *[None] * len(entries)][: len(entries)]


def read_lines(descriptor: int) -> list[str]:
    """The lines that were written into a pipe, though its other end may still be open."""
    os.set_blocking(descriptor, False)
    content = b""
    with suppress(BlockingIOError):
        while part := os.read(descriptor, 1 << 16):
            content += part
    return content.decode().splitlines()


def _verdict(lines: list[str], code: int) -> Verdict | None:
    ended = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    if not lines:  # it did not get so far
        return None
    if code == -signal.SIGKILL:
        return Verdict(
            "its import was killed (SIGKILL), perhaps because memory ran out", lasting=False
        )
    if len(lines) == 1:
        if code == -signal.SIGALRM:
            return Verdict(f"its import does not end within {IMPORT} s")
        return Verdict(f"it ends the interpreter when it is imported ({ended})")
    fault, threads, lasting = json.loads(lines[1])
    if not lasting:
        return Verdict(str(fault), lasting=False)
    if code == -signal.SIGALRM:
        return Verdict(
            f"it keeps the process from ending ({threads or 'no thread'} is still running)"
        )
    if code:
        return Verdict(f"it ends the process itself ({ended})")
    return Verdict(str(fault))
