"""Runs of several processes repeat, go on, and are led by one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import every_rank, torchrun
from toys import toy_recipe, toy_registry

from jemkit import ConfigError, Diverged, Preempted, train
from jemkit.checkpoint import load
from jemkit.runtime import distributed
from jemkit.runtime.folder import RunFolder
from jemkit.runtime.trees import differing

REGISTRY = toy_registry()
STEPS = 12


def recipe(*overrides: str) -> Any:
    """Two epochs of six steps; batch norm, a penalty on squared means, SAM."""
    options = ("run.batch_size=8", "run.max_train=54", "backbone.density.penalty=0.1", *overrides)
    return toy_recipe(REGISTRY, "sadajem", "ebjdat", "sam", *options)


def run(
    out: str, *, until: int = STEPS, resume: bool = False, overrides: tuple[str, ...] = ()
) -> None:
    """Train to the end, or until a stop before step `until`."""
    steps = iter(range(1000))
    stop: Callable[[], bool] | None = None if until == STEPS else lambda: next(steps) >= until
    try:
        train(recipe(*overrides), Path(out), registry=REGISTRY, resume=resume, stop=stop)
    except Preempted:
        assert until < STEPS


def whole_runs(name: str) -> dict[str, list[str]]:
    """Twice the same run; one that is stopped and gone on with; what one process began."""
    folder = Path(name)
    for out in ("a", "b"):
        run(str(folder / out))
    run(str(folder / "cut"), until=5)
    if distributed.shard().rank == 0:
        shutil.copytree(folder / "cut", folder / "two-then-one")
    run(str(folder / "cut"), resume=True)
    run(str(folder / "one-then-two"), resume=True)
    run(str(folder / "sync"), overrides=("backbone.network.norm=sync",))
    return {"files": sorted(p.name for p in folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    run(str(made / "one-then-two"), until=5)
    run(str(made / "one"))
    every_rank(whole_runs, str(made))
    return made


def end_of(run: Path) -> dict[str, Any]:
    return load(run / "checkpoints" / f"step-{STEPS:08d}")


def different(one: Path, other: Path) -> list[str]:
    """Where two runs' ends differ but for what a clock told."""
    found = differing(end_of(one), end_of(other))
    return [at for at in found if "seconds" not in at]


def test_a_run_of_two_processes_repeats_bit_for_bit(folder: Path) -> None:
    assert different(folder / "a", folder / "b") == []
    losses = [[row["loss"] for row in RunFolder(folder / n).metrics()] for n in ("a", "b")]
    assert losses[0] == losses[1]


def test_it_goes_on_bit_for_bit_after_a_stop(folder: Path) -> None:
    assert different(folder / "a", folder / "cut") == []
    events = [json.loads(x)["event"] for x in (folder / "cut" / "events.jsonl").open()]
    assert "preempted" in events
    assert "resume" in events


def test_each_process_has_its_slots_and_a_stream_of_its_own(folder: Path) -> None:
    state = end_of(folder / "a")
    (other,) = state["ranks"]
    assert len(state["density"]["states"]) == len(other["density"]["states"]) == 30
    assert not torch.equal(state["density"]["states"], other["density"]["states"])
    assert not torch.equal(state["rng"], other["rng"])


def test_the_first_process_of_a_group_draws_the_first_batch_as_one_that_is_alone(
    folder: Path,
) -> None:
    """The same data in the same order: only chains differ."""
    states = [end_of(folder / name)["loader"] for name in ("one", "a")]
    assert list(differing(*states)) == []
    assert different(folder / "one", folder / "a") != []


def test_another_number_of_processes_deals_the_buffer_out_anew_and_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "ranks" in end_of(folder / "one-then-two")
    before = load(folder / "two-then-one" / "checkpoints" / "step-00000005")
    run(str(folder / "two-then-one"), resume=True)
    assert "saved by 2 process(es) and gone on with by 1" in caplog.text
    state = end_of(folder / "two-then-one")
    assert "ranks" not in state
    assert len(state["density"]["states"]) == 60
    drawn = [r["density"]["drawn"] for r in (before, *before["ranks"])]
    assert drawn == [10, 10]  # five steps of two chains each: half of a batch is the density's
    assert state["density"]["drawn"] == 4 * STEPS


def test_synchronised_batch_norm_trains_to_the_end(folder: Path) -> None:
    assert all(p.isfinite().all() for p in end_of(folder / "sync")["model"].values())


def test_what_cannot_be_shared_evenly_is_refused_before_the_first_step(tmp_path: Path) -> None:
    leader, follower = every_rank(refused, str(tmp_path))
    assert leader == ["cannot share 9 images", "cannot share a buffer of 61 slots"]
    assert follower == []  # one voice
    assert not list(tmp_path.iterdir())


def refused(name: str) -> list[str]:
    told = []
    for overrides, start in (
        (("run.batch_size=9",), "cannot share 9 images"),
        (("backbone.buffer.capacity=61",), "cannot share a buffer of 61 slots"),
    ):
        try:
            run(f"{name}/x", overrides=overrides)
        except ConfigError as error:
            told += [start] if start in str(error) else [str(error)]
    return told


DIGITS = (
    "train", "--dataset", "digits", "--epochs", "2", "--batch-size", "32", "--device", "cpu",
    "--set", "run.max_train=320", "--set", "backbone.buffer.capacity=200",
    "--set", "backbone.steps=2", "--set", "run.eval_images=16",
)  # fmt: skip


def test_torchrun_trains_with_one_writer_and_one_voice(tmp_path: Path) -> None:
    done = torchrun(*DIGITS, "--out", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert 0 <= json.loads(done.stdout)["clean_accuracy"] <= 1
    assert [int(row["step"]) for row in RunFolder(tmp_path / "run").metrics()] == list(range(18))
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").open()]
    assert events == ["start", "epoch", "epoch", "end"]


def test_a_run_that_diverges_ends_in_every_process_and_one_says_so(tmp_path: Path) -> None:
    assert every_rank(diverging, str(tmp_path)) == ["Diverged", "ended"]
    events = [json.loads(line) for line in (tmp_path / "x" / "events.jsonl").open()]
    assert events[-1]["event"] == "diverged"
    assert "rollback" in [event["event"] for event in events]  # it was tried together, too


def diverging(name: str) -> str:
    try:
        run(f"{name}/x", overrides=("optimizer.lr=1e9", "updater.rho=0"))
    except Diverged:
        return "Diverged"
    return "ended"


def test_a_lost_process_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    """torchrun starts all of them again, and they go on without being told to."""
    began = torchrun(
        *DIGITS, "--epochs", "5", "--out", "lost",
        cwd=tmp_path, options=("--max-restarts=1",), kill=lost,
    )  # fmt: skip
    assert began.returncode == 0, began.stderr
    events = [json.loads(line)["event"] for line in (tmp_path / "lost" / "events.jsonl").open()]
    assert events.count("start") == events.count("resume") == 1
    assert [int(row["step"]) for row in RunFolder(tmp_path / "lost").metrics()] == list(range(45))


def lost(folder: Path) -> bool:
    """When the second process is to be killed: once the first epoch is saved."""
    return (folder / "lost" / "checkpoints" / "step-00000009" / "manifest.json").exists()
