"""Runs of several processes repeat, resume, stop and roll back together."""

import json
import shutil
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import processes
from groups import CUT, DIGITS, EPOCH, REGISTRY, SICK, SMALL, STEPS, different, end_of, recipe, run
from ranks import every_rank, torchrun
from toys import toy_recipe
from waiting import until

from jemkit import ConfigError, Diverged, Preempted, Trainer, train
from jemkit.attacks.base import Threat
from jemkit.evaluation.sample import sample
from jemkit.evaluation.subjects import subject_at
from jemkit.metrics.evaluator import Context
from jemkit.runtime import distributed
from jemkit.runtime.checkpoint import load, newest
from jemkit.runtime.pytree import differing
from jemkit.runtime.rng import generator
from jemkit.runtime.run_dir import RunFolder
from jemkit_plugins.generation.samples import buffer_states


def whole_runs(name: str) -> dict[str, list[str]]:
    """A run; the same stopped and resumed; one that a single process began."""
    folder = Path(name)
    run(str(folder / "a"))
    run(str(folder / "cut"), until=CUT)
    if distributed.shard().rank == 0:
        shutil.copytree(folder / "cut", folder / "two-then-one")
    run(str(folder / "cut"), resume=True)
    run(str(folder / "one-then-two"), resume=True)
    run(str(folder / "sync"), overrides=("backbone.network.norm=sync",))
    return {"files": sorted(p.name for p in folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    run(str(made / "one-then-two"), until=CUT)
    run(str(made / "one"))
    every_rank(whole_runs, str(made))
    return made


def stopped_in_validation(name: str, *overrides: str) -> dict[str, Any]:
    """Rank 0 is asked to stop at the fourth pass of the first epoch's validation."""
    first = distributed.shard().rank == 0
    folder = RunFolder.create(Path(name)) if first else RunFolder(Path(name))
    trainer, polls, ended = Trainer(recipe(*overrides), folder), 0, ""

    def stop() -> bool:
        nonlocal polls
        polls += first and trainer.guard.updates == EPOCH
        return polls > 3

    trainer.polling.patience, trainer.stop = 0.0, stop
    try:
        trainer.run(until=EPOCH + 2)
    except Preempted as error:
        ended = f"{error}, {error.reported}"
    return {"step": trainer.step, "epochs": len(trainer.history), "ended": ended}


@pytest.mark.parametrize("overrides", [(), ("run.shard=true",)])
def test_a_stop_in_validation_stops_all_processes_there(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    results = every_rank(stopped_in_validation, str(tmp_path / "run"), *overrides)
    ended = f"stopped at step {EPOCH}; continue with --resume"
    assert results == [
        {"step": EPOCH, "epochs": 0, "ended": f"{ended}, {reported}"} for reported in (False, True)
    ]
    assert not list((tmp_path / "run" / "samples").iterdir())


def stopped_at_rank_one(name: str) -> str:
    """The last process alone is asked to stop, before its third step."""
    polls = iter(range(100))
    try:
        train(
            recipe(), Path(name), registry=REGISTRY,
            stop=lambda: distributed.shard().rank == 1 and next(polls) >= 2,
        )  # fmt: skip
    except Preempted as error:
        return str(error)
    return "ended"


def test_a_stop_of_any_process_stops_all_and_is_saved(tmp_path: Path) -> None:
    messages = every_rank(stopped_at_rank_one, str(tmp_path / "run"))
    assert messages == ["stopped at step 2; continue with --resume"] * 2
    assert newest(tmp_path / "run" / "checkpoints") == (
        tmp_path / "run" / "checkpoints" / "step-00000002"
    )


def refused_to_compile(name: str) -> str:
    made = recipe("backbone.network.norm=sync", "run.compile=true")
    try:
        train(made, Path(name), registry=REGISTRY)
    except ConfigError as error:
        return f"{error.reported}: {error}"
    return ""


def test_passes_in_which_processes_meet_are_not_compiled(tmp_path: Path) -> None:
    message, other = every_rank(refused_to_compile, str(tmp_path / "run"))
    assert "batch norm over 2 processes communicates inside each pass" in message
    assert other == message.replace("False", "True", 1)  # rank 0 reports it
    assert not (tmp_path / "run").exists()


def sick_runs(name: str) -> None:
    for out, harmed in (("a", False), ("b", False), ("harmed", True)):
        options = (f"objective.name={out}", f"objective.harmed={harmed}".lower(), "run.epochs=9")
        made = toy_recipe(REGISTRY, "sadajem", "faulty", "sam", *SMALL[:2], *options)
        stops = iter([*[False] * (SICK + EPOCH), True])
        with suppress(Preempted):  # some steps after it has gone back
            train(made, Path(name) / out, registry=REGISTRY, stop=partial(next, stops))


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sick")
    every_rank(sick_runs, str(made))
    return made


def gone_back(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A rollback as the run tells it, and the state that it went on from."""
    events = [json.loads(line) for line in (run / "events.jsonl").open()]
    (rollback,) = [event for event in events if event["event"] == "rollback"]
    assert (rollback["step"], rollback["to"]) == (SICK, EPOCH)
    return rollback, load(run / "checkpoints" / f"step-{EPOCH:08d}")


def test_after_a_rollback_every_process_has_another_stream(sick: Path) -> None:
    seed = recipe().recipe.run.seed
    event, state = gone_back(sick / "a")
    assert event["renewed"] == 0
    for part, words in ((state, ()), (state["ranks"][0], (1,))):
        wanted = generator(torch.device("cpu"), seed, "chains", "attempt", 1, *words)
        assert torch.equal(part["rng"], wanted.get_state())


def test_after_a_rollback_every_process_has_fresh_chains_for_its_sick_ones(sick: Path) -> None:
    event, state = gone_back(sick / "harmed")
    share = [
        float((part["density"]["states"].abs() == 1).flatten(1).all(dim=1).float().mean())
        for part in (state, *state["ranks"])
    ]
    assert share == [0, 0]
    assert 0 < event["renewed"] <= 30  # the second process's alone


def test_a_rolled_back_run_of_two_processes_repeats_bit_for_bit(sick: Path) -> None:
    one, other = (newest(sick / name / "checkpoints") for name in "ab")
    assert one is not None
    assert other is not None
    assert one.name == other.name > f"step-{EPOCH:08d}"
    differences = differing(load(one), load(other))
    assert [at for at in differences if "seconds" not in at and "/objective/name" not in at] == []


def test_a_run_of_two_processes_repeats_bit_for_bit_also_after_a_stop(folder: Path) -> None:
    assert different(folder / "a", folder / "cut") == []
    losses = [[row["loss"] for row in RunFolder(folder / n).metrics()] for n in ("a", "cut")]
    assert losses[0] == losses[1]
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


def test_another_number_of_processes_reshards_the_buffer_and_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "ranks" in end_of(folder / "one-then-two")
    before = load(folder / "two-then-one" / "checkpoints" / f"step-{CUT:08d}")
    run(str(folder / "two-then-one"), resume=True)
    assert "saved by 2 process(es) and resumed by 1" in caplog.text
    state = end_of(folder / "two-then-one")
    assert "ranks" not in state
    assert len(state["density"]["states"]) == 60
    drawn = [r["density"]["drawn"] for r in (before, *before["ranks"])]
    assert drawn == [2 * CUT] * 2  # half of a batch of four is the density's
    assert state["density"]["drawn"] == 4 * STEPS


def test_a_run_that_has_ended_is_resharded_without_a_word(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ended = shutil.copytree(folder / "a", tmp_path / "ended")
    run(str(ended), resume=True)
    assert "saved by" not in caplog.text
    assert different(folder / "a", ended) == []


def test_what_several_processes_saved_is_judged_and_sampled_with_the_whole_buffer(
    folder: Path,
) -> None:
    state = end_of(folder / "a")
    parts = [r["density"]["states"] for r in (state, *state["ranks"])]
    whole = torch.stack(parts, dim=1).flatten(0, 1)
    subject = subject_at(folder / "a", REGISTRY, torch.device("cpu"), which="last")
    density: Any = subject.model.density
    assert torch.equal(density.buffer.states, whole)
    ctx = Context(torch.Generator(), Threat("Linf", 8.0))
    assert len(buffer_states(subject.model, ctx, 1000).x) == len(whole) == 60
    samples = sample(
        folder / "a", registry=REGISTRY, n=60, source="buffer", device="cpu", which="last"
    )
    pixels = subject.model.bounds.to_unit(subject.model.bounds.clamp(whole))
    sums = [x.flatten(1).sum(1).sort().values for x in (samples.pixels, pixels)]
    assert torch.equal(*sums)


def test_synchronised_batch_norm_trains_to_the_end(folder: Path) -> None:
    assert all(p.isfinite().all() for p in end_of(folder / "sync")["model"].values())


def test_what_cannot_be_shared_evenly_is_refused_before_the_first_step(tmp_path: Path) -> None:
    assert every_rank(refused, str(tmp_path)) == [
        [f"{reported}: cannot divide 9 images", f"{reported}: cannot divide a buffer of 61 slots"]
        for reported in (False, True)
    ]
    assert not list(tmp_path.iterdir())


def refused(name: str) -> list[str]:
    messages = []
    for overrides, start in (
        (("run.batch_size=9",), "cannot divide 9 images"),
        (("backbone.buffer.capacity=61",), "cannot divide a buffer of 61 slots"),
    ):
        try:
            run(f"{name}/x", overrides=overrides)
        except ConfigError as error:
            messages.append(f"{error.reported}: {start if start in str(error) else error}")
    return messages


@pytest.mark.slow  # quick: runtime/test_fsdp_runs.py, evaluation/test_distributed_evaluate.py
def test_torchrun_trains_with_one_writer_and_one_voice(tmp_path: Path) -> None:
    done = torchrun(*DIGITS, "--out", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert 0 <= json.loads(done.stdout)["clean_accuracy"] <= 1
    assert [int(row["step"]) for row in RunFolder(tmp_path / "run").metrics()] == list(range(18))
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").open()]
    assert events == ["start", "epoch", "epoch", "end"]


def test_a_run_that_diverges_ends_in_every_process_and_rank_0_reports_it(tmp_path: Path) -> None:
    assert every_rank(diverging, str(tmp_path)) == ["Diverged, False", "Diverged, True"]
    events = [json.loads(line) for line in (tmp_path / "x" / "events.jsonl").open()]
    assert events[-1]["event"] == "diverged"
    assert "rollback" in [event["event"] for event in events]  # it was tried together, too


def diverging(name: str) -> str:
    try:
        run(f"{name}/x", overrides=("optimizer.lr=1e9", "updater.rho=0"))
    except Diverged as error:
        return f"Diverged, {error.reported}"
    return "ended"


def test_a_lost_process_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    """Where torchrun starts all of them again, they resume without an option."""
    words = (*DIGITS, "--epochs", "3", "--out", "lost")
    first, other = processes(*words, cwd=tmp_path)
    until(lambda: lost(tmp_path), "the first epoch")
    other.send_signal(signal.SIGKILL)
    assert first.wait() != 0
    assert "error: another process was lost" in first.text("stderr")
    assert "Traceback" not in first.text("stderr")
    again = processes(*words, cwd=tmp_path, TORCHELASTIC_RESTART_COUNT="1")
    assert [process.wait() for process in again] == [0, 0], again[0].text("stderr")
    events = [json.loads(line)["event"] for line in (tmp_path / "lost" / "events.jsonl").open()]
    assert events.count("start") == events.count("resume") == 1
    assert [int(row["step"]) for row in RunFolder(tmp_path / "lost").metrics()] == list(range(27))


def lost(folder: Path) -> bool:
    """When the second process is to be killed: once the first epoch is saved."""
    return (folder / "lost" / "checkpoints" / "step-00000009" / "manifest.json").exists()
