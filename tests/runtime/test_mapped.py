"""Arrays by memory map: what a file holds, without reading it; and files that are refused."""

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jemkit.errors import DataError
from jemkit.runtime.mapped import array_names, map_arrays

X = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
GIB = 2**30


def test_the_arrays_of_an_npz_are_those_that_numpy_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, image=X, label=np.array([3, 1]), note=np.array("x"), turned=np.asfortranarray(X))
    arrays = map_arrays(path, ["image", "label", "turned", "missing"])
    assert set(arrays) == {"image", "label", "turned"}
    assert isinstance(arrays["image"], np.memmap)
    assert np.array_equal(arrays["image"], X)
    assert np.array_equal(arrays["turned"], X)
    assert arrays["label"].tolist() == [3, 1]
    assert array_names(path) == ["image", "label", "note", "turned"]
    with pytest.raises(ValueError, match="read-only"):
        arrays["image"][0] = 0


def test_an_npy_is_the_first_array(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    assert np.array_equal(map_arrays(tmp_path / "a.npy", ["image", "label"])["image"], X)
    assert array_names(tmp_path / "a.npy") == []


def sparse(path: Path, shape: tuple[int, ...]) -> Path:
    """An .npy of zeros that takes no room on the disk."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with path.open("wb") as file:
        file.write(header.getvalue())
        file.truncate(len(header.getvalue()) + int(np.prod(shape, dtype=np.int64)))
    return path


def test_a_file_larger_than_memory_is_not_read(tmp_path: Path) -> None:
    n = 256 * GIB // (32 * 32 * 3)
    mapped = map_arrays(sparse(tmp_path / "a.npy", (n, 32, 32, 3)), ["image"])["image"]
    assert mapped.nbytes > 255 * GIB
    assert mapped[[0, n // 2, n - 1]].sum() == 0


def objects(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, image=np.array([{}, []], dtype=object), label=np.zeros(2, np.int64))


def compressed(path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, image=X)


def text(path: Path) -> None:
    path.write_text("no images")


def cut(path: Path) -> None:
    whole = io.BytesIO()
    np.savez(whole, image=np.zeros((100, 8, 8, 1), np.uint8))
    path.write_bytes(whole.getvalue()[:3000])


def cut_array(path: Path) -> None:
    whole = io.BytesIO()
    np.save(whole, np.zeros((100, 8, 8, 1), np.uint8))
    path.write_bytes(whole.getvalue()[:3000])


def boasting(path: Path) -> None:
    """A header in a zip that claims more than the member holds."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999,)}".ljust(117) + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"0123"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", member)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (objects, "never unpickles"),
        (compressed, "numpy.savez in place of numpy.savez_compressed"),
        (text, "neither an .npz nor an .npy file"),
        (cut, "damaged, or cut short"),
        (cut_array, "damaged, or cut short"),
        (boasting, "damaged, or cut short"),
        (Path.mkdir, "is not a regular file"),
        (lambda path: None, "is missing"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "a.npz")
    with pytest.raises(DataError, match=message):
        map_arrays(tmp_path / "a.npz", ["image"])
