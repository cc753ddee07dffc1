"""States are compared bit for bit, and written so that any reader of safetensors reads them."""

from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from states import tensors

from jemkit.runtime.files import DTYPES, file_hash, load_tensors, write_tensors
from jemkit.runtime.pytree import Snapshot, differing, same


def test_equal_means_every_bit() -> None:
    zero, nan = torch.zeros(2), torch.tensor([float("nan")])
    assert same(nan, nan.clone())
    assert same(float("nan"), float("nan"))
    assert not same(zero, -zero)
    assert not same(0.0, -0.0)
    assert not same(torch.zeros(2, 1), torch.zeros(1, 2))
    assert not same(zero, None)
    assert not same(zero, 0)
    assert same(zero.to(memory_format=torch.contiguous_format), zero)


def test_where_two_states_differ_is_reported_by_path() -> None:
    one = {"a": [1, {"b": torch.zeros(2)}], "only": 1, 3: "x"}
    other = {"a": [1, {"b": torch.ones(2)}], "also": 1, 3: "y"}
    assert list(differing(one, other)) == ["/only", "/also", "/a/1/b", "/3"]
    assert list(differing([1], [1, 2])) == ["/"]
    assert list(differing({"a": {}}, {"a": []})) == ["/a"]


@given(tensors=st.dictionaries(st.text(min_size=1), tensors, max_size=5))
def test_tensors_are_written_as_safetensors_reads_them(
    tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tensors") / "here.safetensors"
    digest = write_tensors(path, tensors)
    assert digest == file_hash(path)
    assert same(safetensors.torch.load_file(path), tensors)
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(tensors)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
def test_every_type_is_saved_or_refused_by_its_name(tmp_path: Path, dtype: torch.dtype) -> None:
    odd = torch.arange(3).to(dtype)[1:]
    if dtype in DTYPES:
        write_tensors(tmp_path / "x", {"odd": odd, "tied": odd, "t": odd.expand(2, 2).T})
        assert same(load_tensors(tmp_path / "x")["tied"], odd)
        return
    with pytest.raises(TypeError, match=r"cannot store torch\.complex64 .at odd"):
        write_tensors(tmp_path / "x", {"odd": odd})


def test_a_snapshot_reuses_its_memory_and_takes_another_shape_when_it_comes() -> None:
    snapshot = Snapshot()
    first = snapshot.of({"a": [torch.ones(3)], "b": 1})
    second = snapshot.of({"a": [torch.zeros(3)], "b": 2})
    assert first["a"][0].data_ptr() == second["a"][0].data_ptr()
    assert same(second, {"a": [torch.zeros(3)], "b": 2})
    assert same(snapshot.of({"a": torch.ones(2, 2)}), {"a": torch.ones(2, 2)})
