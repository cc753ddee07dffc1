"""k steps, save, load in a new process, k more: the same as 2k steps, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_a_new_process
from states import timeless
from toys import BACKBONES, MATRIX, OBJECTIVES, UPDATERS, toy_recipe, toy_registry

from jemkit import Trainer
from jemkit.runtime import checkpoint
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder

CUT, END = 4, 8  # six steps an epoch: an epoch's end lies between them
REGISTRY = toy_registry()


def begun(names: list[str], path: Path) -> Trainer:
    return Trainer(toy_recipe(REGISTRY, *names), RunFolder.create(path))


def go_on(names: list[str], path: Path) -> Trainer:
    trainer = Trainer(toy_recipe(REGISTRY, *names), RunFolder(path))
    newest = checkpoint.newest(path / "checkpoints")
    if newest is None:
        raise FileNotFoundError(path)
    trainer.load_state_dict(checkpoint.load(newest))
    return trainer


def loaded(path: Path, step: int) -> dict[str, Any]:
    return timeless(checkpoint.load(path / "checkpoints" / f"step-{step:08d}"))


def gone_on_with(cases: list[tuple[list[str], Path]], end: int) -> None:
    torch.set_num_threads(1)
    for names, folder in cases:
        torch.rand(3)  # torch's own generator stands elsewhere
        go_on(names, folder).run(until=end)


OTHERS = [
    ["sadajem", "ebjdat", "sam", "run.ema_decay=0.9", "run.ema_warmup=true", "run.theta_steps=2"],
    ["jem", "jem", "plain", "optimizer.use=adam", "optimizer.lr=0.001", "schedule.decay=cosine"],
    ["jempp", "ebjdat", "awp", "run.precision=bf16"],
    ["mebm", "ebjdat", "plain", "backbone.buffer.conditional=true"],
    ["jem", "ebjdat", "plain", "backbone.density.batch_norm=released"],
    ["jem", "jem", "plain", "backbone.sampler.use=sgld_momentum"],
    ["sadajem", "ebjdat", "plain", "backbone.sampler.use=mala"],
    [
        "classifier",
        "trades",
        "plain",
        "optimizer.decay_norms=false",
        "schedule.decay=onecycle",
        "run.ema_decay=0.9",
        "run.ema_warmup=true",
        "run.ema_copy=0.2",
        "backbone.views.cutmix=true",
        "objective.attack.optimizer=adam",
        "objective.smoothing=0.1",
    ],
]


def compared(combinations: list[list[str]], folder: Path, cut: int, end: int) -> None:
    """Whole runs against runs that a new process goes on with."""
    cases = []
    for i, names in enumerate(combinations):
        begun(names, folder / f"whole-{i}").run(until=end)
        begun(names, folder / f"cut-{i}").run(until=cut)
        cases.append((names, folder / f"cut-{i}"))
    in_a_new_process(gone_on_with, cases, end)
    for i, (names, path) in enumerate(cases):
        one, other = loaded(folder / f"whole-{i}", end), loaded(path, end)
        for key, value in one.items():
            assert same(value, other[key]), (names, key)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_run_that_is_cut_and_gone_on_with_is_the_run_that_is_not(
    tmp_path: Path, backbone: str
) -> None:
    """Every backbone, every objective by one of them, and every updater with two objectives."""
    pairs = {("ebjdat", "plain"), ("jem", "plain"), ("ce", "plain")}
    if backbone == "classifier":  # without chains, which cost most
        pairs |= {(o, "plain") for o in OBJECTIVES}
    elif backbone == "jempp":
        pairs |= {(o, u) for o in ("ebjdat", "jem") for u in UPDATERS}
        pairs |= {(o, "plain") for o in OBJECTIVES if REGISTRY["objective"][o].needs_density}
    cases = [list(names) for names in MATRIX if names[0] == backbone and names[1:] in pairs]
    compared(cases, tmp_path, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_combination_that_is_cut_and_resumed_is_the_run_that_is_not(
    tmp_path: Path, backbone: str
) -> None:
    compared([list(names) for names in MATRIX if names[0] == backbone], tmp_path, CUT, END)


def test_a_run_with_more_to_remember_goes_on_past_an_epoch_as_if_it_had_not_been_cut(
    tmp_path: Path,
) -> None:
    compared(OTHERS, tmp_path, CUT, END)


@pytest.mark.parametrize("cut", [1, 5, 6, 7])
def test_it_does_not_matter_where_in_an_epoch_a_run_is_cut(tmp_path: Path, cut: int) -> None:
    names = ["sadajem", "ebjdat", "sam"]
    begun(names, tmp_path / "whole").run(until=END)
    begun(names, tmp_path / "cut").run(until=cut)
    go_on(names, tmp_path / "cut").run(until=END)
    assert same(loaded(tmp_path / "whole", END), loaded(tmp_path / "cut", END))


def test_the_law_can_fail_where_any_part_of_the_state_is_forgotten(tmp_path: Path) -> None:
    names = ["sadajem", "ebjdat", "plain"]
    begun(names, tmp_path / "whole").run(until=END)
    begun(names, tmp_path / "cut").run(until=CUT)
    for forgotten in ("model", "optimizer", "density", "loader", "rng"):
        state = go_on(names, tmp_path / "cut").state_dict()
        fresh = begun(names, tmp_path / f"fresh-{forgotten}").state_dict()
        trainer = begun(names, tmp_path / f"forgot-{forgotten}")
        trainer.load_state_dict({**state, forgotten: fresh[forgotten]})
        trainer.run(until=END)
        one, other = loaded(tmp_path / "whole", END), timeless(trainer.state_dict())
        assert not same(one["model"], other["model"]), forgotten


def test_loading_a_state_does_not_tie_a_run_to_it(tmp_path: Path) -> None:
    first = begun(["jem", "ebjdat", "plain"], tmp_path / "run")
    first.run(until=2)
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-00000002")
    unchanged = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-00000002")
    other = begun(["jem", "ebjdat", "plain"], tmp_path / "other")
    other.load_state_dict(state)
    other.run(until=4)
    assert same(state["model"], unchanged["model"])
    assert same(state["density"], unchanged["density"])
    assert torch.equal(state["rng"], unchanged["rng"])
