"""A checkpoint whose hashes agree but which no run wrote is refused by name, or harmless."""

import copy
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import toy_recipe, toy_registry

from jemkit import DataError, JemkitError, Trainer
from jemkit.config.recipe import Resolved, complete
from jemkit.evaluation.subjects import subject_at
from jemkit.runtime import checkpoint
from jemkit.runtime.checkpoint import FILES, FORMAT, MANIFEST, MODEL, TENSORS, TREE
from jemkit.runtime.files import file_hash, write_json, write_tensors
from jemkit.runtime.pytree import packed, same
from jemkit.runtime.run_dir import RunFolder
from jemkit.training.run import resume_from

REGISTRY = toy_registry()
CUT, END = 8, 14  # six steps an epoch: the first has ended, the second ends on the way
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2.5, -0.5, 1e308, 10**30, -(10**30), 10**400, math.nan,
    math.inf, "", "x", "1", [], [1], ["x"], {}, {"a": 1}, {0: 1}, torch.zeros(2),
]  # fmt: skip
Path_ = tuple[str | int, ...]


class Saved(NamedTuple):
    folder: Path
    recipe: Resolved
    state: dict[str, Any]


def saved_run(folder: Path, optimizer: str) -> Saved:
    recipe = toy_recipe(
        REGISTRY, "jem", "ebjdat", "plain", f"optimizer.use={optimizer}", "run.ema_decay=0.5",
        "backbone.buffer.capacity=9", "backbone.network.channels=1", "run.epochs=4",
    )  # fmt: skip
    run = RunFolder.create(folder / "run")
    Trainer(recipe, run).run(until=CUT)
    whole = complete(recipe, REGISTRY)
    run.write_config(whole.tables, whole.origins)
    newest = checkpoint.newest(run.checkpoints)
    assert newest is not None
    for other in checkpoint.complete(run.checkpoints)[:-1]:
        checkpoint.remove(other)
    return Saved(folder, recipe, checkpoint.load(newest))


@pytest.fixture(scope="module", params=["sgd", "adam"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved_run(tmp_path_factory.mktemp("run"), request.param)


def leaves(tree: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Every place of a state, tables and lists included."""
    if at:
        yield at
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*at, key))


def changed(state: dict[str, Any], at: Path_, how: str, odd: Any) -> dict[str, Any]:
    """A copy of the state with one value left out, doubled, or another."""
    whole = copy.deepcopy(state)
    into: Any = whole
    for key in at[:-1]:
        into = into[key]
    old = into[at[-1]]
    if how == "leave out":
        del into[at[-1]]
    elif isinstance(old, torch.Tensor) and how != "odd":
        into[at[-1]] = {
            "dtype": old.to(torch.int32 if old.dtype == torch.float32 else torch.float32),
            "shape": torch.cat([old.reshape(-1), old.reshape(-1)[:1]]),
            "negative": torch.full_like(old, 0) - 1 if old.dtype != torch.uint8 else old.flip(0),
        }.get(how, old[:0] if old.ndim else old.reshape(1))
    elif isinstance(old, list) and how == "double":
        into[at[-1]] = old * 40
    else:
        into[at[-1]] = odd
    return whole


HOW = ("leave out", "odd", "odd", "dtype", "shape", "negative", "empty", "double")


def write(path: Path, state: dict[str, Any]) -> None:
    """A checkpoint of any state, its manifest right."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    model = state.get("model")
    write_tensors(path / MODEL, {k: v for k, v in model.items() if isinstance(v, torch.Tensor)})
    tensors: dict[str, torch.Tensor] = {}
    tree = packed({k: v for k, v in state.items() if k != "model"}, "", tensors)
    write_tensors(path / TENSORS, tensors)
    (path / TREE).write_text(json.dumps({"format": FORMAT, "tree": tree}))
    hashes = {name: file_hash(path / name) for name in FILES}
    write_json(path / MANIFEST, {"format": FORMAT, "sha256": hashes})


def gone_on(saved: Saved, state: dict[str, Any]) -> Trainer:
    """The run, gone on with from another state to its fourteenth step."""
    run = saved.folder / "again"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(saved.folder / "run", run)
    write(run / "checkpoints" / f"step-{CUT:08d}", state)
    trainer = Trainer(saved.recipe, RunFolder(run))
    resume_from(trainer, trainer.folder)
    trainer.run(until=END)
    return trainer


PLACES = [
    ("best", "epoch"), ("best",), ("ema",), ("care", "tried"), ("loader", "step"), ("loader",),
    ("loader", "order"), ("history",), ("history", 0, "accuracy"), ("rng",), ("device",),
    ("model",),
    ("optimizer", "state"), ("optimizer", "param_groups", 0, "params"), ("seconds",), ("density",),
    ("density", "drawn"), ("care", "vitals", "drifts"), ("care", "vitals", "levels"),
]  # fmt: skip


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data(), how=st.sampled_from(HOW), odd=st.sampled_from(ODD))
def test_a_state_with_one_value_changed_is_refused_or_gone_on_with(
    saved: Saved, draw: st.DataObject, how: str, odd: Any
) -> None:
    at = draw.draw(st.sampled_from([*PLACES, *leaves(saved.state)]))
    state = changed(saved.state, at, how, odd)
    if not isinstance(state.get("model"), dict):
        return
    try:
        trainer = gone_on(saved, state)
    except JemkitError:
        return
    assert trainer.step == END


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_settings_of_the_optimizer_that_float32_cannot_hold_are_refused(
    saved: Saved, name: str
) -> None:
    state = changed(saved.state, ("optimizer", "param_groups", 0, name), "odd", 1e308)
    with pytest.raises(JemkitError, match=name):
        gone_on(saved, state)


def test_a_state_as_it_was_written_is_gone_on_with(saved: Saved) -> None:
    assert gone_on(saved, saved.state).step == END
    trainer = Trainer(saved.recipe, RunFolder(saved.folder / "again"))
    trainer.load_state_dict(saved.state)
    assert same(saved.state["optimizer"]["state"], trainer.state_dict()["optimizer"]["state"])


REMEDIES = [
    {"attempt": i + 1, "of": 3, "signal": "E(x)", "what": "ran away", "step": 1, "since": 1,
     "to": 0, "remedy": "steps", "renewed": 0, "with": ""}
    for i in range(40)
]  # fmt: skip
WRONG: list[tuple[Path_, Any, str]] = [
    (("best",), {"score": [1.0, 1.0, 1]}, "best"),
    (("best", "epoch"), "one", "best"),
    (("best", "score"), [0.5], "best"),
    (("ema",), None, "wrong at ema"),
    (("ema",), 3, "ema"),
    (("care", "tried"), REMEDIES, "care/tried: 40 attempts of 3"),
    (("care", "vitals", "drifts", "E(x)"), torch.zeros(2), "care/vitals/drifts"),
    (("loader", "step"), -1, "loader/step"),
    (("loader", "step"), 10**9, "loader/step"),
    (("loader", "step"), "8", "loader/step"),
    (("loader", "order"), torch.arange(3), "loader/order"),
    (("loader", "order"), torch.arange(48) * 0 + 10**9, "loader/order"),
    (("loader", "rng"), torch.zeros(7, dtype=torch.uint8), "loader/rng"),
    (("rng",), torch.zeros(5056), "wrong at rng"),
    (("history", 0, "accuracy"), "0.5", "history/0/accuracy"),
    (("history",), [], "history"),
    (("seconds",), "long", "seconds"),
    (("density", "drawn"), "many", "chains were begun"),
    (("density", "states"), torch.zeros(9, 1, 8, 8, dtype=torch.float64), "a buffer of"),
    (("optimizer", "state", 0), {"momentum_buffer": torch.zeros(3)}, "optimizer/state/0"),
    (("optimizer", "param_groups"), [], "optimizer/param_groups"),
    (("micro_batch",), 2**80, "micro_batch"),
]


@pytest.mark.parametrize(("at", "value", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_the_place_in_the_state_is_named(saved: Saved, at: Path_, value: Any, message: str) -> None:
    state = copy.deepcopy(saved.state)
    into: Any = state
    for key in at[:-1]:
        into = into[key]
    into[at[-1]] = value
    with pytest.raises(JemkitError) as caught:
        gone_on(saved, state)
    assert message in str(caught.value)


@pytest.mark.parametrize("where", ["model", "ema"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_weights_of_another_type_are_not_cast(saved: Saved, where: str, dtype: torch.dtype) -> None:
    state = copy.deepcopy(saved.state)
    name = next(iter(state[where]))
    state[where][name] = state[where][name].to(dtype)
    with pytest.raises(DataError, match=rf"wrong at {where}/{re.escape(name)}"):
        gone_on(saved, state)


def test_a_drift_that_is_not_finite_is_not_gone_on_with(saved: Saved) -> None:
    state = copy.deepcopy(saved.state)
    drifts = state["care"]["vitals"]["drifts"]
    name = next(iter(drifts))
    drifts[name][-1] = math.nan
    with pytest.raises(DataError, match=r"care/vitals/drifts/.*other than numbers"):
        gone_on(saved, state)


@pytest.mark.parametrize("value", [{}, {"a": torch.zeros(1)}, 3, [1], "x"])
def test_what_is_judged_of_a_state_is_checked_too(saved: Saved, value: Any) -> None:
    run = saved.folder / "judged"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(saved.folder / "run", run)
    for name, other in (("ema", value), ("density", 3), ("ranks", [{"density": 1}])):
        write(run / "checkpoints" / "best", {**saved.state, name: other})
        with pytest.raises(DataError, match=f"the saved state is wrong at {name}"):
            subject_at(run, REGISTRY, torch.device("cpu"))
