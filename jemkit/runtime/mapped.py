"""Arrays of .npz and .npy files by memory map: only what is indexed is read."""

import math
import os
import struct
import zipfile
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from jemkit.errors import DataError
from jemkit.runtime.files import reading
from jemkit.runtime.opening import opened

Arrays = dict[str, NDArray[Any]]

HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""What reads the shape, the Fortran order and the type of an array, by its format."""

LOCAL = struct.Struct("<26xHH")
"""The header before a member of a zip file; its last two fields are the lengths that follow."""


def map_arrays(path: Path, names: Iterable[str]) -> Arrays:
    """The arrays of these names that an .npz has, or the array of an .npy under the first name.

    They are read-only. Nothing is unpickled, and compressed members are refused.
    """
    wanted = list(names)
    with reading(path, f"{path} is damaged, or cut short"), opened(path) as file:
        start = file.read(6)
        if start.startswith(b"PK"):
            return _members(file, path, wanted)
        if start == b"\x93NUMPY":
            return {wanted[0]: _mapped(file, 0, os.fstat(file.fileno()).st_size, path.name)}
    raise DataError(f"{path} is neither an .npz nor an .npy file; expected what numpy.savez writes")


def array_names(path: Path) -> list[str]:
    """The names of all arrays of an .npz; none of an .npy."""
    with opened(path) as file:
        if not zipfile.is_zipfile(file):
            return []
        with zipfile.ZipFile(file) as archive:
            return [entry.filename.removesuffix(".npy") for entry in archive.infolist()]


def _members(file: BufferedReader, path: Path, names: list[str]) -> Arrays:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
    members = {name: entries[name] for name in names if name in entries}
    for name, entry in members.items():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise DataError(
                f"{path} is compressed, so that {name} cannot be read in part; write it with "
                "numpy.savez in place of numpy.savez_compressed"
            )
    return {name: _member(file, entry) for name, entry in members.items()}


def _member(file: BufferedReader, entry: zipfile.ZipInfo) -> NDArray[Any]:
    file.seek(entry.header_offset)
    name, extra = LOCAL.unpack(file.read(LOCAL.size))
    start = entry.header_offset + LOCAL.size + name + extra
    return _mapped(file, start, entry.file_size, entry.filename)


def _mapped(file: BufferedReader, start: int, size: int, name: str) -> NDArray[Any]:
    """The array that fills `size` bytes from `start` on."""
    file.seek(start)
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"{name} is an array of format {version}")
    shape, fortran, dtype = HEADERS[version](file)
    if dtype.hasobject:
        raise DataError(
            f"{file.name}: {name} holds pickled Python objects, which jemkit never unpickles; "
            "write plain arrays"
        )
    data = file.tell()
    claimed, held = dtype.itemsize * math.prod(shape), start + size - data
    there = os.fstat(file.fileno()).st_size - data
    if claimed != held or claimed > there:
        raise ValueError(
            f"{name} declares {list(shape)} of {dtype}, {claimed:,} bytes, in {min(held, there):,}"
        )
    if not claimed:
        return np.empty(shape, dtype)
    columns_first = shape[::-1] if fortran else shape
    array = np.memmap(file, dtype, "r", data, columns_first)
    return cast("NDArray[Any]", array.T if fortran else array)
