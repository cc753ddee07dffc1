"""Files of others that are hostile, damaged or no checkpoint: refused, and never run."""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from authors import made
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from torch import Tensor

from jemkit.errors import DataError, memory_ran_out
from jemkit.training.pretrained import read_checkpoint
from jemkit.training.pretrained.layouts import read_layout


def weights_at(path: Path) -> dict[str, Tensor]:
    return read_layout(read_checkpoint(path).weights, "sadajem").weights


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


# What is refused, each by one message.


class Hostile:
    """Would make a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Greedy:
    def __reduce__(self) -> Any:
        return bytearray, (10**12,)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_pickle_is_never_run(new: bool, protocol: int, tmp_path: Path) -> None:
    state = {**made().state_dict(), "evil": Hostile(tmp_path / "was-here")}
    torch.save(
        {"model_state_dict": state}, tmp_path / "a.pt", pickle_protocol=protocol,
        _use_new_zipfile_serialization=new,
    )  # fmt: skip
    wanted = r"calls posix\.mkdir" if protocol == 2 else "STACK_GLOBAL|did not write"
    with pytest.raises(DataError, match=wanted):
        read_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_hostile_pickle_is_never_run(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "was-here"), protocol))
    with pytest.raises(DataError):
        read_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_asks_for_memory_is_refused(new: bool, tmp_path: Path) -> None:
    torch.save({"a": Greedy()}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(DataError, match=r"calls .*bytearray"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 3 bytes")])
def test_memory_that_runs_out_while_a_sound_file_is_read_is_no_fault_of_the_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    torch.save(made().state_dict(), tmp_path / "a.pt")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(error)) as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert memory_ran_out(caught.value)
    assert not isinstance(caught.value, DataError)


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(made(), tmp_path / "a.pt")
    with pytest.raises(DataError, match="Ask its author for a state_dict"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_tensor_that_unfolds_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="a unfolds to"):
        read_checkpoint(tmp_path / "a.pt")


def rezipped(path: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> Path:
    """A good checkpoint with its archive rewritten, entry by entry."""
    good = io.BytesIO()
    torch.save(made().state_dict(), good)
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            change(new, entry, old.read(entry))
    return path


def test_a_rewritten_archive_is_read_as_long_as_nothing_changes(tmp_path: Path) -> None:
    path = rezipped(tmp_path / "a.pt", lambda new, e, content: new.writestr(e.filename, content))
    assert same(weights_at(path), read_layout(made().state_dict(), "sadajem").weights)


def test_a_zip_bomb_is_refused_unread(tmp_path: Path) -> None:
    def change(new: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
        if entry.filename.endswith("/data/0"):
            content = bytes(10**7)
        new.writestr(entry.filename, content, compress_type=zipfile.ZIP_DEFLATED)

    with pytest.raises(DataError, match=r"declares [\d,]+ bytes in a file with [\d,]+, .*zip bomb"):
        read_checkpoint(rezipped(tmp_path / "a.pt", change))


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """An overlapping bomb: entries of the directory that point to one another's bytes."""
    path = rezipped(tmp_path / "a.pt", lambda new, e, content: new.writestr(e.filename, content))
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for i in range(5):
            copy = zipfile.ZipInfo(f"archive/data/9{i}")
            copy.header_offset, copy.CRC = largest.header_offset, largest.CRC
            copy.file_size = copy.compress_size = 10 * largest.file_size
            archive.filelist.append(copy)
            archive._didModify = True
    with pytest.raises(DataError, match="zip bomb"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/outside", "archive/../../outside", "a\\..\\b", "C:/outside"]
)
def test_a_path_that_leaves_the_archive_is_refused(name: str, tmp_path: Path) -> None:
    path = rezipped(tmp_path / "a.pt", lambda new, e, content: new.writestr(e.filename, content))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(DataError, match="leaves its folder"):
        read_checkpoint(path)


def test_entries_that_claim_to_be_folders_are_read_as_they_are(tmp_path: Path) -> None:
    """torch's own reader gives uninitialised memory for them."""
    path = rezipped(tmp_path / "a.pt", lambda new, e, content: new.writestr(e.filename, content))
    with zipfile.ZipFile(path, "a") as archive:
        for entry in archive.filelist:
            entry.external_attr |= 0x10
        archive._didModify = True
    assert same(weights_at(path), read_layout(made().state_dict(), "sadajem").weights)


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = rezipped(tmp_path / "a.pt", lambda new, e, content: new.writestr(e.filename, content))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", b"x")
    with pytest.raises(DataError, match="a TorchScript program"):
        read_checkpoint(path)


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    path = rezipped(tmp_path / "a.pt", lambda new, e, content: new.writestr(e.filename, content))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", b"x")
    with pytest.raises(DataError, match="two entries of one name"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello, this is a text", "it begins with b'hello, t'"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a checkpoint"),
        (b"PK\x03\x04" + bytes(100), "damaged or not a checkpoint"),
        (struct.pack("<Q", 50) + b"{" + bytes(60), "damaged or not a checkpoint"),
        (pickle.dumps({"a": 1}), "a Python pickle that torch.save did not write"),
        (pickle.dumps({"a": 1}, 2), "a Python pickle that torch.save did not write"),
    ],
)
def test_what_is_no_checkpoint_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_checkpoint(tmp_path / "a.pt")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        read_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(DataError, match="is not a file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it contains no weights: list"),
        ({}, "it contains no weights: it is empty"),
        ({"a": 1}, "'a' is int"),
        ({"model_state_dict": {"a": "b"}, "epoch": 3}, "'model_state_dict' is dict, 'epoch' is"),
        ({"a": torch.tensor([1.0, float("nan")])}, "a contains NaN or inf"),
    ],
)
def test_what_is_no_state_dict_is_named(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match=message):
        read_checkpoint(tmp_path / "a.pt")


WEIGHTS = read_layout(made().state_dict(), "sadajem").weights
GOOD, OLD = io.BytesIO(), io.BytesIO()
torch.save({"model_state_dict": made().state_dict(), "replay_buffer": torch.zeros(3)}, GOOD)
torch.save(made().state_dict(), OLD, _use_new_zipfile_serialization=False)
bits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1)


def flipped(data: bytes, flips: list[tuple[float, int]]) -> bytes:
    changed = bytearray(data)
    for where, bit in flips:
        changed[min(int(where * len(changed)), len(changed) - 1)] ^= 1 << bit
    return bytes(changed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "a.pt"


@bounded(max_examples=60, deadline=None)
@given(flips=bits, ends=st.booleans())
def test_flipped_bits_are_a_data_error_or_change_no_weight(
    flips: list[tuple[float, int]], ends: bool, place: Path
) -> None:
    data = GOOD.getvalue()
    if ends:  # the pickle and the directory, where a flip means most
        flips = [(w * 0.05 if b % 2 else 0.95 + w * 0.05, b) for w, b in flips]
    place.write_bytes(flipped(data, flips))
    try:
        weights = read_layout(read_checkpoint(place).weights, "sadajem").weights
    except DataError:
        return
    assert same(weights, WEIGHTS)


@bounded(max_examples=40, deadline=None)
@given(flips=bits, ends=st.booleans())
def test_flipped_bits_of_an_old_file_are_a_data_error_or_finite_weights(
    flips: list[tuple[float, int]], ends: bool, place: Path
) -> None:
    """A file from before torch 1.6 has no checksum: flips among its numbers cannot be told."""
    if ends:
        flips = [(w * 0.03, b) for w, b in flips]
    place.write_bytes(flipped(OLD.getvalue(), flips))
    try:
        weights = read_layout(read_checkpoint(place).weights, "sadajem").weights
    except DataError:
        return
    assert all(t.isfinite().all() for t in weights.values())
    assert {k: t.shape for k, t in weights.items()} == {k: t.shape for k, t in WEIGHTS.items()}


@bounded(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), old=st.booleans())
def test_a_truncated_file_is_a_data_error(share: float, old: bool, place: Path) -> None:
    data = (OLD if old else GOOD).getvalue()
    place.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError):
        read_checkpoint(place)


def test_a_thousand_state_dicts_and_endless_names_are_refused(tmp_path: Path) -> None:
    names = ("conv1.bias", "layer1.0.conv1.bias", "linear.weight")
    many = {f"m{i}.{name}": torch.zeros(1) for i in range(1000) for name in names}
    torch.save(many, tmp_path / "many.pt")
    with pytest.raises(
        DataError, match="it contains 1000 state dicts that fit; select one by --key"
    ):
        read_checkpoint(tmp_path / "many.pt")
    assert read_checkpoint(tmp_path / "many.pt", key="m17").key == "m17"
    torch.save({"a." * 100_000: torch.zeros(1)}, tmp_path / "long.pt")
    with pytest.raises(DataError, match="no known format"):
        read_layout(read_checkpoint(tmp_path / "long.pt").weights, "wrn")
