"""One writer per folder at a time: a lock that is released when its process ends."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from jemkit.errors import ConfigError, DataError
from jemkit.runtime.opening import has_hard_links, opened, opened_in_place, read_text

log = logging.getLogger(__name__)

LOCK = ".lock"
"""The lock file of a run's folder. It stays when the run ends; only a process holds the lock."""
EVALUATION_LOCK = ".evaluation.lock"
"""The lock file of its record, held while figures are merged into it."""
SIGNED = b'{"pid"'
"""How a lock file begins once it has been held."""
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
AGAIN = 0.02
"""Seconds between two attempts to take a lock."""


@contextmanager
def locked(path: Path, what: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` inside the block; raise if another process holds it.

    It is first waited for, up to `patience` seconds. `what` tells others what the holder does, such
    as "trains in runs/a". The kernel releases the lock however the process ends.
    """
    until = time.monotonic() + patience
    with opened_in_place(path) as file:
        while not _taken(file, path):
            if time.monotonic() >= until:
                raise ConfigError(_refusal(path))
            time.sleep(AGAIN)
        _sign(file, path, what)
        yield


@contextmanager
def in_use(folder: Path, *, alone: bool = False) -> Iterator[None]:
    """Use a folder inside the block, beside other users of it, or `alone`; raise if that cannot be.

    Nothing is written: the kernel knows the users until their processes end.
    """
    there = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(there, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(there)
        other = "evaluates or deletes" if alone else "deletes"
        raise ConfigError(
            f"{folder} is in use: another process {other} it. Wait for it to end"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(there)
            raise
    try:
        yield
    finally:
        os.close(there)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path`; nothing is written.

    It is tested only if the process that signed it may be alive, so that one which is about to take
    the lock is not refused.
    """
    try:
        if not path.exists() or _has_ended(path):
            return False
        with opened(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (DataError, OSError):  # no lock file, or a file system without locks
        return False
    return False


def _has_ended(path: Path) -> bool:
    """Whether the signature is of a process of this machine that no longer exists."""
    try:
        about: dict[str, Any] = json.loads(read_text(path))
        if about["host"] != socket.gethostname():
            return False
        os.kill(int(about["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return False
    return False


def _taken(file: FileIO, path: Path) -> bool:
    """Take the lock if no process holds it, or if the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(path)) from None
        cannot = f"{path.parent} cannot be locked on this file system"
        log.warning("%s; do not start a second run in this folder", cannot)
    return True


def _sign(file: FileIO, path: Path, what: str) -> None:
    """Write who holds the lock; the lock is held even if the disk is too full to write this.

    A file that is not only a lock file, by its content or a second name, is left unchanged.
    """
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "what": what}
    file.seek(0)
    if has_hard_links(file) or file.read(len(SIGNED)) not in (SIGNED, b""):
        return
    try:
        os.ftruncate(file.fileno(), 0)
        file.write(json.dumps(about).encode())
    except OSError as error:
        log.warning("%s: %s", path, error)


def _refusal(path: Path) -> str:
    holder = "another process"
    try:
        about: dict[str, Any] = json.loads(read_text(path))
        holder = f"process {about['pid']} on {about['host']} {about['what']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not written yet
        pass
    return f"{path.parent} is in use: {holder}. Wait for it to end, or choose another folder"
