"""One writer in a folder at a time: a lock that ends with the process that holds it."""

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

from jemkit.errors import ConfigError
from jemkit.runtime.opening import is_shared, opened_in_place, read_text

log = logging.getLogger(__name__)

LOCK = ".lock"
"""The lock file of a run's folder. It stays when the run ends: what counts is who holds it."""
SIGNED = b'{"pid"'
"""What a lock file begins with once somebody has held it."""
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
AGAIN = 0.02
"""Seconds until a lock that is waited for is asked for again."""


@contextmanager
def locked(path: Path, what: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` inside the block; refuse where another process holds it.

    With `patience`, so many seconds are waited before that.

    `what` says, to whoever is refused, what its holder does: "trains in runs/a". The kernel lets go
    of the lock however the process ends, so that no stale one is ever in the way.
    """
    with opened_in_place(path) as file:
        try:
            _take(file, time.monotonic() + patience)
        except BlockingIOError:
            raise ConfigError(_refusal(path)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise OSError(error.errno, error.strerror, str(path)) from None
            log.warning("%s cannot be locked on this file system; start no second run", path.parent)
        _sign(file, path, what)
        yield


def _take(file: FileIO, until: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
        time.sleep(AGAIN)


def _sign(file: FileIO, path: Path, what: str) -> None:
    """Write who holds the lock; it is held even where the disk is too full to say so.

    A file that is not a lock's alone, by its content or another name, is left as it is.
    """
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "what": what}
    file.seek(0)
    if is_shared(file) or file.read(len(SIGNED)) not in (SIGNED, b""):
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
