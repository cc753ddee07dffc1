"""Runs with FSDP-sharded weights repeat, resume, end together and refuse what they cannot do."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from forked import processes
from groups import CUT, DIGITS, EPOCH, different, end_of, recipe, run
from ranks import every_rank
from safetensors.torch import save_file
from torch import Tensor, nn
from toys import toy_registry

from jemkit import ConfigError, Diverged, train
from jemkit.runtime import distributed
from jemkit.runtime.checkpoint import load
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.training.trainer import Trainer

SHARD = "run.shard=true"
MIXED = (
    "backbone.sampler.use=pyld", "run.precision=bf16", "optimizer.use=adam", "run.epochs=1",
)  # fmt: skip


def whole_runs(name: str) -> dict[str, Any]:
    """A run, one that is stopped and resumed, and each change between sharded and whole weights."""
    folder = Path(name)
    common = ("run.channels_last=no", "run.ema_decay=0.5")
    run(str(folder / "a"), overrides=(*common, SHARD))
    run(str(folder / "whole"), overrides=common)
    run(str(folder / "cut"), until=CUT, overrides=(*common, SHARD))
    run(str(folder / "uncut"), until=CUT, overrides=common)
    if distributed.shard().rank == 0:
        shutil.copytree(folder / "cut", folder / "shared-then-one")
        shutil.copytree(folder / "cut", folder / "shared-then-whole")
    run(str(folder / "cut"), resume=True, overrides=(*common, SHARD))
    run(str(folder / "shared-then-whole"), resume=True, overrides=common)
    run(str(folder / "uncut"), resume=True, overrides=(*common, SHARD))
    run(str(folder / "mixed"), overrides=(SHARD, *MIXED))
    start = folder / "start.safetensors"
    train(recipe(SHARD), folder / "begun", registry=toy_registry(), init_from=start)
    return {"refused": refused(folder), "ended": diverging(folder)}


def refused(folder: Path) -> list[str]:
    errors = []
    for option in ("run.compile=true", "run.channels_last=yes"):
        try:
            run(str(folder / "refused"), overrides=(SHARD, option))
        except ConfigError as error:
            errors.append(str(error))
    return errors


def diverging(folder: Path) -> str:
    try:
        run(str(folder / "diverged"), overrides=(SHARD, "optimizer.lr=1e9", "updater.rho=0"))
    except Diverged:
        return "Diverged"
    return "ended"


class Runs(NamedTuple):
    """Where they are, and what each process told."""

    folder: Path
    results: list[dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = tmp_path_factory.mktemp("runs")
    save_file(dict(started().state_dict()), made / "start.safetensors")
    return Runs(made, every_rank(whole_runs, str(made)))


@pytest.fixture
def folder(runs: Runs) -> Path:
    return runs.folder


def started() -> nn.Module:
    """The model of another seed."""
    return Trainer(recipe("run.seed=9", "run.channels_last=no"), RunFolder(Path())).backbone.model


def test_a_shared_run_repeats_bit_for_bit_and_goes_on_so_after_a_stop(folder: Path) -> None:
    assert different(folder / "a", folder / "cut") == []


@pytest.mark.parametrize("other", ["a", "uncut", "shared-then-whole"])
def test_a_shared_run_is_the_run_of_processes_that_hold_all_weights(
    folder: Path, other: str
) -> None:
    """Also where either goes on with what the other saved; and its checkpoints look the same."""
    one, two = end_of(folder / "whole"), end_of(folder / other)
    assert same(shapes(one), shapes(two))
    for kind in ("model", "ema"):
        for name, t in one[kind].items():
            torch.testing.assert_close(two[kind][name], t, rtol=1e-5, atol=1e-5)
    momenta = [state["optimizer"]["state"][3]["momentum_buffer"] for state in (one, two)]
    torch.testing.assert_close(*momenta, rtol=1e-5, atol=1e-5)
    accuracy = [[entry["accuracy"] for entry in state["history"]] for state in (one, two)]
    assert accuracy[0] == accuracy[1]
    assert (folder / other / "samples" / "epoch-0002.png").exists()


def shapes(state: Any) -> Any:
    """A state's names and shapes."""
    if isinstance(state, dict):
        return {k: shapes(v) for k, v in state.items() if k not in ("seconds", "history", "care")}
    return list(state.shape) if isinstance(state, Tensor) else 0


def test_one_process_takes_a_shared_checkpoint_up_as_it_was_saved(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at = folder / "shared-then-one"
    saved = load(at / "checkpoints" / f"step-{CUT:08d}")
    trainer = Trainer(recipe(SHARD, "run.ema_decay=0.5"), RunFolder(at))
    trainer.load_state_dict(saved)
    state = trainer.state_dict()
    for kind in ("model", "ema", "optimizer"):
        assert same(state[kind], saved[kind])
    run(str(at), resume=True, overrides=(SHARD, "run.channels_last=no", "run.ema_decay=0.5"))
    assert "run.shard shards nothing in one process" in caplog.text
    assert all(t.isfinite().all() for t in end_of(at)["model"].values())


def test_pyld_adam_and_bfloat16_train_to_the_end_with_sharded_weights(folder: Path) -> None:
    """PYLD computes gradients through single layers, outside the forward pass of the model."""
    state = load(folder / "mixed" / "checkpoints" / f"step-{EPOCH:08d}")
    assert all(t.isfinite().all() for t in state["model"].values())
    assert set(state["optimizer"]["state"][0]) == {"exp_avg", "exp_avg_sq", "step"}


def test_a_shared_run_begins_with_the_weights_that_it_is_given(folder: Path) -> None:
    first = load(folder / "begun" / "checkpoints" / "step-00000000")
    assert same(first["model"], dict(started().state_dict()))
    assert not same(end_of(folder / "begun")["model"], first["model"])


def test_a_shared_run_that_diverges_ends_in_every_process(runs: Runs) -> None:
    assert [rank["ended"] for rank in runs.results] == ["Diverged", "Diverged"]
    events = (runs.folder / "diverged" / "events.jsonl").read_text().splitlines()
    assert "rollback" in [json.loads(line)["event"] for line in events]


def test_what_weights_in_shares_cannot_do_is_refused_before_the_first_step(runs: Runs) -> None:
    (compiled, laid_out), other = (rank["refused"] for rank in runs.results)
    assert "omit run.shard or run.compile" in compiled
    assert 'set run.channels_last to "auto" or "no"' in laid_out
    assert other == [compiled, laid_out]
    assert not (runs.folder / "refused").exists()


def test_a_sharded_command_has_one_writer_and_one_voice(tmp_path: Path) -> None:
    running = processes(*DIGITS, "--shard", "--out", "run", "--json", cwd=tmp_path)
    first, other = [process.outcome() for process in running]
    assert (first.code, other.code) == (0, 0), first.err + other.err
    assert (len(first.out.splitlines()), other.out) == (1, "")
    assert 0 <= json.loads(first.out)["clean_accuracy"] <= 1
    assert [int(row["step"]) for row in RunFolder(tmp_path / "run").metrics()] == list(range(18))
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").open()]
    assert events == ["start", "epoch", "epoch", "end"]
    assert '"shard": true' in (tmp_path / "run" / "config.json").read_text()
