"""Files that are written whole or not at all, and read without executing anything in them."""

import hashlib
import io
import json
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from jemkit.errors import DataError, JemkitError, memory_ran_out
from jemkit.options import expanded
from jemkit.runtime.disk import until_room
from jemkit.runtime.opening import (
    JSON_LIMIT,
    decoded,
    has_hard_links,
    opened,
    opened_in_place,
    read_file,
)

Piece = bytes | memoryview
MOST_BYTES = 64 * 2**30
"""Limit for a tensor file; a checkpoint of torchvision's largest network has about 10 GiB."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes of safetensors files; jemkit writes exactly these."""
UMASK = os.umask(0)
os.umask(UMASK)  # read once: os.umask can only be read by setting it, for every thread


def write_bytes(path: Path, content: bytes) -> None:
    write_pieces(path, [content])


def write_pieces(path: Path, pieces: Sequence[Piece]) -> str:
    """Write to a temporary file next to `path`, fsync, then rename; returns the SHA-256.

    The hash is of the data to be written: it also detects a disk that stored something else.
    """
    return until_room(path, lambda: _written(path, pieces))


def _written(path: Path, pieces: Sequence[Piece]) -> str:
    digest = hashlib.sha256()
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):  # which may be missing or unknown
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    sync_folder(path.parent)
    return digest.hexdigest()


def append_text(path: Path, text: str) -> None:
    """Append to a file: all of `text`, or nothing if the disk is full.

    A link is rejected. A file with other names (hard links) is copied, so that they stay.
    """

    def added() -> None:
        with opened_in_place(path) as file:
            before, left = file.seek(0, os.SEEK_END), memoryview(text.encode())
            if has_hard_links(file):
                file.seek(0)
                return write_bytes(path, file.read() + left)
            try:
                while left:
                    left = left[file.write(left) or 0 :]
            except OSError as error:
                os.ftruncate(file.fileno(), before)
                raise OSError(error.errno, error.strerror, str(path)) from None

    until_room(path, added)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> str:
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    return write_pieces(path, [text.encode()])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file directly from the tensors' memory; returns its SHA-256."""
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # the largest elements first, which keeps everything aligned
    order = sorted(flat, key=lambda name: (-flat[name].element_size(), name))
    header: dict[str, Any] = {}
    at = 0
    for name in order:
        tensor, end = flat[name], at + flat[name].nbytes
        if tensor.dtype not in DTYPES:
            raise TypeError(f"a safetensors file cannot store {tensor.dtype} (at {name})")
        kind, shape = DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces: list[Piece] = [struct.pack("<Q", len(text)) + text]
    pieces += [flat[name].reshape(-1).view(torch.uint8).numpy().data for name in order]
    return write_pieces(path, pieces)


@contextmanager
def reading(path: Path, fault: str) -> Iterator[None]:
    """A block that reads a file; its errors but a lack of memory are raised as DataError."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except JemkitError:
        raise
    except Exception as error:  # whatever a damaged file causes in its reader
        if memory_ran_out(error):
            raise
        raise DataError(f"{fault}: {error}") from None


def read_json(path: Path) -> Any:
    with reading(path, f"{path} cannot be read as JSON"):
        return json.loads(decoded(read_file(path, JSON_LIMIT)))


def set_aside(path: Path) -> Path:
    """Rename a damaged file to make room for a new one; nothing is deleted."""
    taken = {p.name for p in path.parent.iterdir()}
    stem, end = path.stem, path.suffix
    names = (f"damaged-{stem}{f'-{i}' if i else ''}{end}" for i in range(len(taken) + 1))
    aside = path.with_name(next(name for name in names if name not in taken))
    os.replace(path, aside)
    return aside


def file_hash(path: Path) -> str:
    try:
        with opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def load_tensors(path: Path, most: int = MOST_BYTES) -> dict[str, Tensor]:
    """The tensors of a safetensors file of at most `most` bytes; nothing in it is executed.

    A file that its header does not account for is rejected before it is read.
    """
    fault = f"{path} is not a safetensors file, or is damaged"
    with reading(path, fault), opened(path, most) as file, safetensors.safe_open(path, "pt"):
        return safetensors.torch.load(file.read())


def load_arrays(path: Path, most: int = MOST_BYTES) -> dict[str, Tensor]:
    """The arrays of an .npz file; nothing in it is executed, and it is not a zip bomb."""
    with reading(path, f"{path} is not an .npz file, or is damaged"):
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            whole = sum(entry.file_size for entry in archive.infolist())
        if whole > most:
            raise DataError(f"{path} decompresses to {whole:,} bytes; expected {most:,} at most")
        with np.load(io.BytesIO(read_file(path, most)), allow_pickle=False) as arrays:
            try:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            except MemoryError as error:  # an array may declare any size
                raise DataError(f"{path} is not an .npz file of weights: {error}") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A block that fills a temporary folder, which then becomes `path`; whole or not at all.

    A previous folder `path` is deleted last, or restored on an error. After a kill between the two
    renames it is under its other name, where `checkpoint.recover` finds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = until_room(
        path, lambda: Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    )
    aside = work.with_name(f"{work.name}.old")

    def put() -> None:
        if path.exists():
            os.replace(path, aside)
        try:
            os.replace(work, path)
        except BaseException:
            if aside.exists():
                os.replace(aside, path)
            raise

    try:
        yield work
        os.chmod(work, 0o755)
        sync_folder(work)
        until_room(path, put)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable across a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """$JEMKIT_CACHE, else the user's cache folder."""
    named = os.environ.get("JEMKIT_CACHE")
    if named:
        return expanded(Path(named))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jemkit"
