"""Opens files, the only module that does: regular files only, and never written through a link."""

import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path

from jemkit.errors import DataError

MIB = 2**20
JSON_LIMIT, TOML_LIMIT, LOG_LIMIT = 64 * MIB, MIB, 1024 * MIB
"""The size in bytes above which such a file is not read: jemkit writes none as large."""

QUICKLY = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""Opening a FIFO does not block."""


@contextmanager
def opened(path: Path, limit: int | None = None) -> Iterator[BufferedReader]:
    """Open a regular file, or a link to one, for reading; DataError if it is something else.

    DataError also if it has more than `limit` bytes.

    OSError, with the file's name, if it is missing or may not be read.
    """
    _check_kind(os.stat(path), path)  # before opening: some devices act when they are opened
    with os.fdopen(os.open(path, os.O_RDONLY | QUICKLY), "rb") as file:
        status = os.fstat(file.fileno())
        _check_kind(status, path)
        if limit is not None and status.st_size > limit:
            raise DataError(f"{path} has {status.st_size:,} bytes; expected {limit:,} at most")
        yield file


@contextmanager
def opened_in_place(path: Path) -> Iterator[FileIO]:
    """Open a regular file to read, truncate and append to, created if missing; no link."""
    refuse_link(path)
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CREAT | QUICKLY
    # unbuffered, since a buffer would be written when it is closed
    with os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0) as file:
        _check_kind(os.fstat(file.fileno()), path)
        yield file


def has_hard_links(file: FileIO) -> bool:
    """Whether an open file has other names (hard links), which would change with it."""
    return os.fstat(file.fileno()).st_nlink > 1


def read_file(path: Path, limit: int | None = None) -> bytes:
    """The contents of a regular file; DataError if it has more than `limit` bytes."""
    with opened(path, limit) as file:
        return file.read()


def read_text(path: Path, limit: int = TOML_LIMIT) -> str:
    """The text of a file, in UTF-8 or the encoding of its byte order mark, without that mark."""
    return decoded(read_file(path, limit))


def decoded(content: bytes) -> str:
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8 ({error}); save it as UTF-8") from None


def make_folder(path: Path) -> None:
    """A folder inside a run, created if missing; an error if it is a link."""
    refuse_link(path)
    path.mkdir(parents=True, exist_ok=True)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Reject a run with a link among these files or folders; its own folder may be one."""
    for name in names:
        refuse_link(folder / name)


def refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise DataError(
            f"{path} is a link, but a run must not write outside its folder. Put a file or folder "
            "in its place; a run's whole folder may be a link"
        )


def _check_kind(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a regular file; it is not read")
