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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from jemkit.runtime.files import cache_folder, read_json, write_json

IMPORT, END, LAST = 60, 10, 600  # seconds: to import a plug-in, to end after that, and in total
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST = 5000  # limit on the files of a plug-in that are examined for changes


class Refused(Exception):
    """The exception of a plug-in, as a line."""


def error_line(error: BaseException) -> str:
    """An error as one line, though its message may fail in turn."""
    try:
        text = str(error)
    except BaseException:
        text = "(without a message that can be shown)"
    return f"{type(error).__name__}: {text}"[:500]


@contextmanager
def contained() -> Iterator[None]:
    """Run a plug-in's code: exceptions become Refused, what it prints goes to standard error.

    The command's signal handlers are restored. A KeyboardInterrupt is the user's: a plug-in that
    raises one itself has failed the probe.
    """
    handlers = {number: signal.getsignal(number) for number in STOPS}
    try:
        with _on_standard_error():
            yield
    except (Refused, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Refused(error_line(error)) from None
    finally:
        with suppress(ValueError, TypeError):  # another thread; a handler that is not Python's
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def _on_standard_error() -> Iterator[None]:
    """Send standard output to standard error, also that of C code and of child processes."""
    _flush()
    out = -1
    with suppress(OSError):  # a descriptor is closed
        out = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _flush()
        if out >= 0:
            os.dup2(out, 1)
            os.close(out)


def _flush() -> None:
    """Write what Python and C keep in buffers of standard output."""
    with suppress(OSError, ValueError, AttributeError):  # closed, or none
        sys.__stdout__.flush()  # type: ignore[union-attr]
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)


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
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    code = "import sys; from jemkit.config.probe_child import child; child(sys.argv[1])"
    request = json.dumps([(entry.name, entry.value) for entry in entries])
    running = subprocess.Popen(
        [sys.executable, "-P", "-c", code, request],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    hangs = False
    try:
        running.wait(LAST)
    except subprocess.TimeoutExpired:  # a plug-in has disabled its own alarm
        hangs = True
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    said = running.communicate()[0].splitlines()
    verdicts: list[Verdict | None] = [Verdict(*json.loads(line)) for line in said]
    verdicts += [Verdict("its import does not end")] * hangs
    return [*verdicts, *[None] * len(entries)][: len(entries)]
