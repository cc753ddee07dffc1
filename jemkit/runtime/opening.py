"""Opens files, the only module that does: regular files only, and never written through a link."""

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

MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
"""Byte order marks, which editors on Windows and PowerShell write."""

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
QUICKLY = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""Opening a FIFO does not block."""


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file, or a link to one, for reading; DataError if it is something else.

    OSError, with the file's name, if it is missing or may not be read.
    """
    _check_kind(os.stat(path), path)  # before opening: some devices act when they are opened
    with os.fdopen(os.open(path, os.O_RDONLY | QUICKLY), "rb") as file:
        _check_kind(os.fstat(file.fileno()), path)
        yield file


@contextmanager
def opened_in_place(path: Path, *, create: bool = True) -> Iterator[FileIO]:
    """Open a regular file to read, truncate and append to, created if missing; no link."""
    refuse_link(path)
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | (os.O_CREAT if create else 0) | QUICKLY
    # unbuffered, since a buffer would be written when it is closed
    with os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0) as file:
        _check_kind(os.fstat(file.fileno()), path)
        yield file


def is_shared(file: FileIO) -> bool:
    """Whether an open file has other names (hard links), which would change with it."""
    return os.fstat(file.fileno()).st_nlink > 1


def read_file(path: Path, limit: int | None = None) -> bytes:
    """The contents of a regular file; DataError if it has more than `limit` bytes."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise DataError(f"{path} has {size:,} bytes; expected {limit:,} at most")
        return file.read()


def read_text(path: Path, limit: int = TOML_LIMIT) -> str:
    """The text of a file, in UTF-8 or the encoding of its byte order mark, without that mark."""
    return decoded(read_file(path, limit))


def decoded(content: bytes) -> str:
    coding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(coding)
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
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise DataError(f"{path} is {kind}, not a regular file; it is not read")
