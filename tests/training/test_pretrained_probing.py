"""Checkpoints that people have: the state dict is found by its names, wherever it stands."""

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from authors import Authors, Plain, buffer, made, saved
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from toys import REGISTRY

from jemkit.errors import DataError
from jemkit.training.pretrained import import_checkpoint, read_checkpoint
from jemkit.training.pretrained.layouts import energy_of, head_moved, read_layout, recognised

State = dict[str, Tensor]
JEM: State = made().state_dict()
WRN: State = made(Plain).state_dict()
OTHER: State = made(seed=5).state_dict()
KEYS = (
    "net", "network", "module", "params", "weights", "model.state_dict", "state_dict", "model",
    "model_state_dict", "checkpoint", "netF",
)  # fmt: skip
PREFIXES = (
    "_orig_mod.", "module.module.", "model.", "net.", "backbone.", "module.", "model._orig_mod.",
    "f.",
)  # fmt: skip


def read(content: Any, place: Path, **how: Any) -> Any:
    torch.save(content, place / "a.pt")
    return read_checkpoint(place / "a.pt", **how)


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trained() -> dict[str, Any]:
    """An optimizer's state after a step, its momenta beside weights of the same shapes."""
    module = made()
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


OPTIMIZER = trained()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probed")


@bounded(max_examples=30, deadline=None)
@given(
    keys=st.lists(st.sampled_from(KEYS), max_size=2),
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=2),
    bare=st.booleans(),
    beside=st.booleans(),
    old=st.booleans(),
)
def test_a_state_dict_is_read_under_any_key_and_prefix(
    keys: list[str], prefixes: list[str], bare: bool, beside: bool, old: bool, place: Path
) -> None:
    state = WRN if bare else JEM
    content: Any = OrderedDict(("".join(prefixes) + name, t) for name, t in state.items())
    for key in keys:
        content = {key: content, "epoch": 3, "optimizer": OPTIMIZER} if beside else {key: content}
    torch.save(content, place / "b.pt", _use_new_zipfile_serialization=not old)
    checkpoint = read_checkpoint(place / "b.pt")
    assert same(checkpoint.weights, state)
    assert ("optimizer" in " ".join(checkpoint.beside)) == (beside and bool(keys))


@pytest.mark.parametrize(
    "content",
    [
        (JEM, OPTIMIZER),
        [OPTIMIZER, {"net": JEM}],
        {"state_dict": {"model": JEM}, "optimizer_states": [OPTIMIZER]},
        {"f": {k[2:]: t for k, t in JEM.items() if k[:2] == "f."}, **{
            head: {k.split(".")[1]: t for k, t in JEM.items() if k.startswith(head)}
            for head in ("class_output", "energy_output")
        }},
        {k.replace("f.", "f._orig_mod.module.", 1): t for k, t in JEM.items()},
        {"n_averaged": torch.tensor(7), **{f"module.{k}": t for k, t in JEM.items()}},
        {f"net.{k}": t for k, t in JEM.items()} | {"criterion.weight": torch.ones(10)},
        {"generator": nn.Linear(3, 3).state_dict(), "discriminator": JEM},
    ],
    ids=["pair", "list", "lightning", "parts", "inner", "averaged", "criterion", "two"],
)  # fmt: skip
def test_a_state_dict_is_read_among_other_tensors(content: Any, tmp_path: Path) -> None:
    assert same(read(content, tmp_path).weights, JEM)


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [("model", "ema"), ("params", "params_ema"), ("state_dict", "ema_state_dict"),
     ("net", "swa.module"), ("model", "model_averaged")],
)  # fmt: skip
def test_averaged_weights_are_taken_and_said(plain: str, averaged: str, tmp_path: Path) -> None:
    content = {plain: JEM, averaged: OTHER}
    checkpoint = read(content, tmp_path)
    assert same(checkpoint.weights, OTHER)
    assert checkpoint.averaged == plain
    assert plain in checkpoint.beside
    assert same(read(content, tmp_path, key=plain).weights, JEM)
    made = import_checkpoint(tmp_path / "a.pt", "auto", REGISTRY)
    assert any("averaged weights" in note and "--key" in note for note in made.notes)


def test_several_that_fit_are_named_and_chosen_by_key(tmp_path: Path) -> None:
    content = {"first": JEM, "second": OTHER}
    with pytest.raises(DataError, match=r"2 state dicts that fit.*first, second.*--key"):
        read(content, tmp_path)
    assert same(read(content, tmp_path, key="second").weights, OTHER)
    with pytest.raises(DataError, match=r"under the key 'third'\. There are: first, second"):
        read(content, tmp_path, key="third")
    assert same(read({"first": JEM, "second": dict(JEM)}, tmp_path).weights, JEM)


def test_the_format_chooses_among_state_dicts(tmp_path: Path) -> None:
    content = {"classifier": WRN, "jem": JEM}
    assert same(read(content, tmp_path, format="wrn").weights, WRN)
    assert same(read(content, tmp_path, format="mebm").weights, JEM)
    with pytest.raises(DataError, match="classifier, jem"):
        read(content, tmp_path)


def test_what_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    doubled: Any = torch.zeros(1)
    for _ in range(11):
        doubled = [doubled] * 10
    with pytest.raises(DataError, match="more than 1,000,000 values"):
        read(doubled, tmp_path)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"kind": Plain}, "wrn"),
        ({"norm": "none", "linear": 10}, "jem"),
        ({"yopo": True}, "jempp"),
        ({"linear": 10}, "jempp"),
        ({}, "sadajem"),
    ],
)
def test_a_layout_is_recognised_by_names_and_shapes(
    options: dict[str, Any], wanted: str, tmp_path: Path
) -> None:
    imported = import_checkpoint(saved(tmp_path / "a.pt", made(**options)), "auto", REGISTRY)
    assert imported.format == wanted
    assert any(f"read as {wanted}" in note for note in imported.notes)


def with_trained_head(**options: Any) -> State:
    state = dict(made(**options).state_dict())
    state["energy_output.weight"] = 3 * state["energy_output.weight"]
    return state


@pytest.mark.parametrize("options", [{}, {"norm": "none", "linear": 10}, {"yopo": True}])
def test_a_head_beyond_its_first_range_makes_a_file_m_ebms(options: dict[str, Any]) -> None:
    fresh, moved = made(**options).state_dict(), with_trained_head(**options)
    assert not head_moved(fresh)
    assert head_moved(moved)
    assert recognised(moved) == "mebm"
    assert recognised(fresh) != "mebm"
    assert "from the energy head" in energy_of(moved, "mebm")
    assert "nothing in the file shows" in energy_of(fresh, "mebm")
    assert "it was trained: --format mebm" in energy_of(moved, "jem")


def test_where_the_energy_comes_from_is_said_in_card_and_config(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", made(norm="none", linear=10))
    imported = import_checkpoint(path, "jem", REGISTRY)
    card = (imported.folder / "README.md").read_text()
    assert "energy\\_output" in card or "energy_output" in card
    assert "--format mebm" in imported.energy
    assert imported.energy in (imported.folder / "config.json").read_text()


def test_a_network_of_other_images_is_refused_when_it_is_imported(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", made(Authors, stages=4, width=2))
    with pytest.raises(DataError, match=r"4 stages, of 64 px and more; those of cifar10 .* 32 px"):
        import_checkpoint(path, "mebm", REGISTRY)
    grey = saved(tmp_path / "b.pt", made(Authors, channels=1))
    with pytest.raises(DataError, match="images of 1 channels"):
        import_checkpoint(grey, "mebm", REGISTRY)
    assert not list(tmp_path.glob("*-imported"))


def test_a_claimed_depth_is_refused_before_a_network_of_it_is_built() -> None:
    state = dict(JEM)
    for i in range(2_000):
        state[f"f.layer1.{i}.conv1.weight"] = torch.zeros(1)
    built = []
    handle = register_module_module_registration_hook(lambda *_: built.append(1))
    try:
        with pytest.raises(DataError, match="equally deep: layer1 has 2000 blocks"):
            read_layout(state, "sadajem")
    finally:
        handle.remove()
    assert not built


def calls_of(n: int, place: Path) -> int:
    """Function calls that reading n tiny tensors takes."""
    state = {**JEM, **{f"f.linear.{i}": torch.zeros(2) for i in range(n)}}
    torch.save({"model": state, "replay_buffer": buffer()}, place / "many.pt")
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    sys.setprofile(counted)
    try:
        read_layout(read_checkpoint(place / "many.pt").weights, "jempp")
    finally:
        sys.setprofile(None)
    return count


def test_reading_takes_work_in_proportion_to_the_tensors(tmp_path: Path) -> None:
    none, some, more = (calls_of(n, tmp_path) for n in (0, 500, 1000))
    assert more - none < 2.2 * (some - none)
