"""Files of tensors: no memory is taken for what a header claims and the file does not hold."""

import io
import json
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from safetensors.torch import save_file

from jemkit.errors import DataError
from jemkit.runtime.files import load_arrays, load_tensors, write_tensors
from jemkit_plugins.lpips import _read


def claiming(path: Path, shape: list[int], end: int, data: bytes = b"", length: int = 0) -> Path:
    """A safetensors file with a header of one's own."""
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", length or len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("shape", "end", "data", "length"),
    [
        ([10**12], 4 * 10**12, b"", 0),
        ([4], 16, b"\0" * 12, 0),
        ([4], 16, b"\0" * 20, 0),
        ([4], 16, b"\0" * 16, 2**62),
        ([4], 16, b"\0" * 16, 1),
        ([-4], 16, b"\0" * 16, 0),
    ],
)
def test_a_header_that_claims_other_bytes_is_refused(
    shape: list[int], end: int, data: bytes, length: int, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="not a safetensors file"):
        load_tensors(claiming(tmp_path / "a.safetensors", shape, end, data, length))


@pytest.mark.parametrize(
    "text", [b"[]", b"{}x", b'{"a": 1}', b'{"a": {}}', b"[" * 5000, b"\xff\xfe"]
)
def test_a_header_of_another_form_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(DataError, match="not a safetensors file"):
        load_tensors(path)


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.truncate(65 * 2**30)  # sparse: it takes no room on the disk
    with pytest.raises(DataError, match=r"69,793,218,560 bytes; expected 68,719,476,736 at most"):
        load_tensors(path)
    write_tensors(path, {"a": torch.zeros(100)})
    with pytest.raises(DataError, match="expected 100 at most"):
        load_tensors(path, 100)
    assert load_tensors(path)["a"].shape == (100,)


@pytest.mark.parametrize("length", [0, 2**62])
def test_a_file_that_its_header_does_not_account_for_is_refused_unread(
    length: int, tmp_path: Path
) -> None:
    path = claiming(tmp_path / "a.safetensors", [4], 16, length=length)
    os.truncate(path, 2**29)  # sparse: it takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="not a safetensors file"):
            load_tensors(path)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_what_is_no_regular_file_is_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(DataError, match="not a regular file"):
        load_tensors(tmp_path / "pipe.safetensors")


def array(shape: Any, dtype: str = "<f4", data: bytes = b"", version: int = 1) -> bytes:
    """An array of the .npy format with a header of one's own."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


def zipped(path: Path, method: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        array("(1000000000000,)"),
        array("(4,)", data=b"\0" * 12),
        array("(-4,)", data=b"\0" * 16),
        array("(2,)", "|O", b"\0" * 16),
        array("(4,)", data=b"\0" * 16, version=9),
        array("__import__('os')"),
        b"nonsense",
        b"",
    ],
)
def test_an_array_that_claims_other_bytes_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not an \.npz file"):
        load_arrays(zipped(tmp_path / "a.npz", a=content))


def test_an_archive_that_unfolds_is_refused_unread(tmp_path: Path) -> None:
    content = array("(25000000,)", data=bytes(100_000_000))
    path = zipped(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, a=content)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(
        DataError, match=r"decompresses to 100,000,0\d\d bytes; expected 50,000,000"
    ):
        load_arrays(path, 50_000_000)
    assert load_arrays(path)["a"].shape == (25_000_000,)


@bounded(max_examples=40, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_archive_is_a_data_error_or_the_same_arrays(
    where: float, bit: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.arange(6.0).reshape(2, 3), b=np.ones(4, np.float32))
    data = bytearray(buffer.getvalue())
    at = int(where * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(data)
    try:
        arrays = load_arrays(path)
    except DataError:
        return
    for name, tensor in arrays.items():
        if name in ("a", "b"):
            assert tensor.numel() in (6, 4)


def test_lpips_reads_its_weights_by_the_same_rules(tmp_path: Path) -> None:
    weights = {"features.0.weight": torch.ones(2, 3)}
    np.savez(tmp_path / "a.npz", **{k: v.numpy() for k, v in weights.items()})
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    for name in ("a.npz", "a.safetensors", "a.pth", "b.pth"):
        assert torch.equal(_read(tmp_path / name)["features.0.weight"], torch.ones(2, 3))
    zipped(tmp_path / "c.npz", a=array("(1000000000000,)"))
    claiming(tmp_path / "c.safetensors", [10**12], 4 * 10**12)
    (tmp_path / "c.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-30])
    for name in ("c.npz", "c.safetensors", "c.pth"):
        with pytest.raises(DataError, match="cannot be read as weights"):
            _read(tmp_path / name)
