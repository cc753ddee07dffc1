"""A checkpoint is whole or not there; what is damaged is refused and nothing in it is run."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from states import state, tensors

from jemkit import DataError
from jemkit.runtime import checkpoint
from jemkit.runtime.checkpoint import FILES, MANIFEST, MODEL
from jemkit.runtime.files import file_hash
from jemkit.runtime.pytree import same


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "step-1", state())
    return tmp_path / "step-1"


def test_a_state_comes_back_bit_for_bit(saved: Path) -> None:
    assert same(checkpoint.load(saved), state())
    assert sorted(p.name for p in saved.iterdir()) == sorted([*FILES, MANIFEST])


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | tensors
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc", min_size=1) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(tree=trees)
def test_any_tree_of_plain_values_and_tensors_comes_back(
    tree: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tree") / "here"
    checkpoint.save(path, {"model": {}, "tree": tree})
    assert same(checkpoint.load(path)["tree"], tree)


def test_two_states_differ_where_one_bit_does() -> None:
    one, other = state(), state()
    other["model"]["head.bias"][0] += 1e-7
    assert not same(one, other)
    assert not same({"a": 1}, {"b": 1})
    assert not same(torch.zeros(1), torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_flipped_byte_in_any_file_is_refused(saved: Path, name: str) -> None:
    raw = bytearray((saved / name).read_bytes())
    for at in (0, len(raw) // 2, len(raw) - 2):
        damaged = bytearray(raw)
        damaged[at] ^= 0x55
        (saved / name).write_bytes(damaged)
        with pytest.raises(DataError):
            checkpoint.load(saved)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("left", [0, 5])
def test_a_truncated_file_is_refused(saved: Path, name: str, left: int) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:left])
    with pytest.raises(DataError):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_refused_by_its_name(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(DataError, match=name):
        checkpoint.load(saved)


class Trap:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_pickle_in_place_of_any_file_is_refused_and_never_executed(
    saved: Path, tmp_path: Path, name: str
) -> None:
    sprung = tmp_path / "sprung"
    (saved / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(DataError):
        checkpoint.load(saved)
    if name in FILES:  # even where the manifest vouches for it
        manifest = json.loads((saved / MANIFEST).read_text())
        manifest["sha256"][name] = file_hash(saved / name)
        (saved / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DataError):
            checkpoint.load(saved)
    assert not sprung.exists()


def test_weights_are_never_read_from_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(DataError, match="not a safetensors file"):
        checkpoint.load_weights(tmp_path / "weights.pt")
    assert not (tmp_path / "sprung").exists()


def test_weights_are_loaded_from_a_checkpoint_a_run_and_a_file(tmp_path: Path) -> None:
    for step in (1, 2):
        path = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        checkpoint.save(path, state(step))
    newest = state(2)["model"]
    for place in (tmp_path / "run", path, path / MODEL):
        assert same(checkpoint.load_weights(place), newest)
    with pytest.raises(DataError, match="is not a checkpoint"):
        checkpoint.load_weights(tmp_path / "nowhere")


def test_a_folder_without_a_manifest_is_no_checkpoint(saved: Path) -> None:
    (saved / MANIFEST).unlink()
    assert checkpoint.newest(saved.parent) is None
    with pytest.raises(DataError, match="missing or a single file"):
        checkpoint.load(saved.parent / "step-7")


def test_a_format_of_another_time_is_named(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        checkpoint.load(saved)


class Interrupted(BaseException):
    """A stop in the midst of writing."""


STEPS = ["write_tensors", "write_json"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupted_write_leaves_the_old_checkpoint_and_no_litter(
    saved: Path, monkeypatch: pytest.MonkeyPatch, step: str, call: int
) -> None:
    whole, calls = getattr(checkpoint, step), []

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == call:
            raise Interrupted
        return whole(*arguments)

    monkeypatch.setattr(checkpoint, step, interrupted)
    with pytest.raises(Interrupted):
        checkpoint.save(saved, state(1))
    monkeypatch.undo()
    assert same(checkpoint.load(saved), state())
    assert list(saved.parent.iterdir()) == [saved]


def test_a_failed_rename_puts_the_old_checkpoint_back(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(target) == saved and not str(source).endswith(".old"):
            raise Interrupted
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(Interrupted):
        checkpoint.save(saved, state(1))
    monkeypatch.undo()
    assert same(checkpoint.load(saved), state())
    assert list(saved.parent.iterdir()) == [saved]


def test_a_finished_write_replaces_the_old_checkpoint_and_leaves_no_litter(saved: Path) -> None:
    checkpoint.save(saved, state(1))
    assert same(checkpoint.load(saved), state(1))
    assert list(saved.parent.iterdir()) == [saved]


def test_pruning_keeps_the_newest_and_clears_what_interrupted_writes_left(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        checkpoint.save(tmp_path / f"step-{step:08d}", {"model": {}})
    (tmp_path / ".step-00000011.abc").mkdir()
    checkpoint.save(tmp_path / "best", {"model": {}})
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-00000002", "step-00000010"]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000010"


def test_what_json_and_safetensors_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    with pytest.raises(TypeError, match="cannot contain Trap"):
        checkpoint.save(tmp_path / "here", {"model": {}, "odd": {"a": Trap(tmp_path)}})
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_vouches_for_a_state_of_no_run_changes_nothing(saved: Path) -> None:
    for tree in ({"items": [["a"]]}, {"tensor": "gone"}, [1], {"items": [[[], 1]]}, {"odd": 1}, 1):
        (saved / "state.json").write_text(json.dumps({"format": 1, "tree": tree}))
        manifest = json.loads((saved / MANIFEST).read_text())
        manifest["sha256"]["state.json"] = file_hash(saved / "state.json")
        (saved / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="not a state of a run"):
            checkpoint.load(saved)
