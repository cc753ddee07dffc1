"""Replayed chains: recorded once a kind, equal to eager ones to the bit, eager where they must."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import Generator, Tensor
from toys import backbone_of, gen, objective_of, updater_of

from jemkit import SGLD, Guard, ModelEnergy, run, train_step
from jemkit.compiled import CompiledGradient, compiled_chains
from jemkit.distance import L2, Logits
from jemkit.memory import MicroBatch
from jemkit.modes import eval_mode, frozen, sampling_mode
from jemkit.networks import SmallCNN
from jemkit.replay import Replay, replay_on
from jemkit.sampling import (
    PYLD,
    Boxed,
    L2Descent,
    Projected,
    Sampler,
    SignDescent,
    eager_run,
    runs_by,
)
from jemkit.testing import toy_batch, toy_model, toy_task

TASK = toy_task()
BATCH = toy_batch(TASK)
SHAPE = tuple(BATCH.x.shape)
few = settings(max_examples=15, deadline=None)


class Aloud:
    """Plays a step by running it: a CUDA graph's stand-in, which holds on to the same tensors."""

    def __init__(self) -> None:
        self.plays = 0

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, step: Callable[[], None], rng: Generator) -> Callable[[], None]:
        def again() -> None:
            self.plays += 1
            step()

        return again


class Refusing(Aloud):
    """A device that cannot record, having drawn before it found out."""

    def record(self, step: Callable[[], None], rng: Generator) -> Callable[[], None]:
        torch.randn(3, generator=rng)
        raise RuntimeError("operation not permitted when\n stream is capturing")


KERNELS: list[Callable[[Tensor], Sampler]] = [
    lambda x: SGLD(step_size=0.1),
    lambda x: PYLD(),
    lambda x: Boxed(SGLD(step_size=0.1, clip=1.0), TASK.bounds),
    lambda x: Projected(SignDescent(), x, 0.1, TASK.bounds),
    lambda x: Projected(L2Descent(), x, 0.1, TASK.bounds, "L2"),
]


@few
@given(seed=seeds, kernel=st.sampled_from(KERNELS), steps=st.integers(0, 4), labelled=st.booleans())
def test_a_replayed_chain_ends_where_the_eager_one_does(
    seed: int, kernel: Callable[[Tensor], Sampler], steps: int, labelled: bool
) -> None:
    """Other images, labels and balls each time, and one recording for all."""
    model, recorder = toy_model(TASK), Aloud()
    replay, ours, theirs = Replay(recorder), gen(seed), gen(seed)
    with sampling_mode(model, "batch_stats"):
        for turn in range(4):
            x = normal(seed + turn, *SHAPE).clamp(-1, 1)
            energy = ModelEnergy(model, BATCH.y.roll(turn) if labelled else None)
            wanted = eager_run(kernel(x), energy, x, theirs, steps)
            assert torch.equal(replay(kernel(x), energy, x, ours, steps), wanted)
            assert torch.equal(ours.get_state(), theirs.get_state())
    assert replay.recorded == (steps > 0)
    assert recorder.plays == 3 * steps


def test_weights_that_move_in_place_are_seen() -> None:
    model, replay, ours, theirs = toy_model(TASK), Replay(Aloud()), gen(), gen()
    energy = ModelEnergy(model)
    with sampling_mode(model, "running_stats"):
        for _ in range(4):
            wanted = eager_run(SGLD(), energy, BATCH.x, theirs, 2)
            assert torch.equal(replay(SGLD(), energy, BATCH.x, ours, 2), wanted)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.1)
    assert replay.recorded == 1


def played(replay: Replay, model: Any, x: Tensor, rng: Generator, **options: Any) -> None:
    with sampling_mode(model, options.pop("mode", "batch_stats")):
        for _ in range(2):
            replay(SGLD(**options), ModelEnergy(model), x, rng, 1)


def test_one_kind_of_chain_is_recorded_once_and_every_other_by_itself() -> None:
    model, rng, replay = toy_model(TASK, SmallCNN(channels=2, norm="batch")), gen(), Replay(Aloud())
    counts = []

    def again(x: Tensor = BATCH.x, rng: Generator = rng, **options: Any) -> None:
        for _ in range(2):
            played(replay, model, x, rng, **options)
        counts.append(replay.recorded)

    again()
    again(x=BATCH.x + 1)
    again(x=BATCH.x[:2])
    again(x=BATCH.x[:, :, :4].transpose(2, 3).contiguous())
    again(x=BATCH.x[:, :, :4].contiguous().transpose(2, 3))  # of the same shape, laid out apart
    again(mode="running_stats")
    again(noise=0.0)
    again(rng=gen())
    with torch.autocast("cpu", torch.bfloat16):
        again()
    again()
    assert counts == [1, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    moved = model.network.conv1.weight
    moved.data = moved.data.clone()
    again()
    assert counts[-1] == 9


def test_another_model_is_never_taken_for_one_that_is_gone() -> None:
    replay, rng = Replay(Aloud(), limit=2), gen()
    for seed in range(6):
        model = toy_model(TASK, seed=seed)
        with sampling_mode(model, "batch_stats"):
            for _ in range(3):
                state = rng.get_state()
                found = replay(SGLD(), ModelEnergy(model), BATCH.x, rng, 1)
                wanted = eager_run(SGLD(), ModelEnergy(model), BATCH.x, gen_at(state), 1)
                assert torch.equal(found, wanted)
        del model
    assert replay.recorded == 6


def gen_at(state: Tensor) -> Generator:
    rng = gen()
    rng.set_state(state)
    return rng


def test_recordings_of_chains_that_memory_has_no_room_for_are_let_go() -> None:
    model, rng, replay = toy_model(TASK), gen(), Replay(Aloud())
    for size in (3, 1, 3, 1):
        played(replay, model, BATCH.x[:size], rng)
    assert replay.recorded == 2
    with MicroBatch(2).held():
        played(replay, model, BATCH.x[:3], rng)
    assert [len(kept.inputs[0]) for kept in replay._kept.values()] == [1]
    played(replay, model, BATCH.x[:1], rng)
    assert replay.recorded == 2


def test_the_recordings_used_longest_ago_are_given_up() -> None:
    model, rng, replay = toy_model(TASK), gen(), Replay(Aloud(), limit=2)
    sizes = (1, 2, 1, 3, 1, 2)  # 2 has gone when it comes again, 1 never
    for size in sizes:
        played(replay, model, BATCH.x[:size], rng)
    assert replay.recorded == 4


@pytest.mark.parametrize("backbone", ["jem", "jempp", "mebm", "sadajem"])
@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("ebjdat", {}),
        ("ebjdat", {"inner": "ce", "distance": Logits()}),
        ("ebjdat", {"distance": L2()}),
        ("pgdat", {}),
        ("trades", {}),
        ("jem", {}),
    ],
)
def test_every_chain_of_a_step_is_replayed_from_its_second_coming_on(
    backbone: str, objective: str, options: dict[str, Any]
) -> None:
    """With compiled gradients too, which recording compiles nothing for."""
    torch._dynamo.reset()
    ends, recorder = [], Aloud()
    replay, unit = Replay(recorder), CompiledGradient("eager")
    for replaying in (None, replay):
        built, chosen = backbone_of(backbone), objective_of(objective, **options)
        rng, updater, compiled = gen(), updater_of("sam", built.model), []
        within: Any = compiled_chains(chosen, unit, replaying)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(3):
                batch = BATCH._replace(x=BATCH.x.roll(step, 0), y=BATCH.y.roll(step, 0), step=step)
                train_step(built, within, updater, batch, rng, Guard())
                compiled.append(len(unit.compilations))
        ends.append([p.detach().clone() for p in built.model.parameters()])
    assert compiled[0] == compiled[2]
    chains = {"ebjdat": 2}.get(objective, 1)
    assert replay.recorded == chains
    assert recorder.plays > 0
    for ours, theirs in zip(*ends, strict=True):
        assert torch.equal(ours, theirs)


@contextmanager
def told() -> Iterator[list[warnings.WarningMessage]]:
    """Every warning inside, repeated ones too."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen


class Held:
    """Something that may change behind its name."""

    scale = 1.0


def test_what_may_change_unseen_is_run_eagerly_and_told_once() -> None:
    model, held, replay, rng = toy_model(TASK), Held(), Replay(Aloud()), gen()

    def energy(x: Tensor) -> Tensor:
        return held.scale * model(x).energy

    with sampling_mode(model, "batch_stats"), told() as seen:
        for scale in (1.0, 2.0, 3.0):
            held.scale = scale
            state = rng.get_state()
            found = replay(SGLD(), energy, BATCH.x, rng, 2)
            assert torch.equal(found, eager_run(SGLD(), energy, BATCH.x, gen_at(state), 2))
    (warning,) = seen
    assert "without a CUDA graph: its energy or kernel holds a Held" in str(warning.message)
    assert replay.recorded == 0


def test_weights_that_ask_for_gradients_are_not_recorded() -> None:
    model, replay, rng = toy_model(TASK), Replay(Aloud()), gen()
    with eval_mode(model), told() as seen:
        for _ in range(3):
            replay(SGLD(), ModelEnergy(model), BATCH.x, rng, 1)
    (warning,) = seen
    assert "not frozen" in str(warning.message)
    assert replay.recorded == 0


def test_where_nothing_can_be_recorded_one_warning_is_given_and_noise_is_as_it_would_be() -> None:
    model, replay, ours, theirs = toy_model(TASK), Replay(Refusing()), gen(), gen()
    energy = ModelEnergy(model)
    with frozen(model), eval_mode(model), told() as seen:
        for _ in range(4):
            wanted = eager_run(SGLD(), energy, BATCH.x, theirs, 3)
            assert torch.equal(replay(SGLD(), energy, BATCH.x, ours, 3), wanted)
    (warning,) = seen
    assert "not permitted when stream is capturing" in str(warning.message)
    assert replay.given_up


def test_a_chain_that_fails_while_it_warms_up_says_so_and_is_not_recorded() -> None:
    model, replay, rng = toy_model(TASK), Replay(Aloud()), gen()
    with frozen(model), eval_mode(model):
        for _ in range(3):
            with pytest.raises(RuntimeError):
                replay(SGLD(), ModelEnergy(model), BATCH.x[:, :, :0], rng, 1)
    assert replay.recorded == 0


def test_outside_the_block_chains_are_eager() -> None:
    model, replay, rng = toy_model(TASK), Replay(Aloud()), gen()
    with sampling_mode(model, "batch_stats"):
        for _ in range(2):
            with runs_by(replay):
                run(SGLD(), ModelEnergy(model), BATCH.x, rng, 1)
        assert replay.recorded == 1
        run(SGLD(), ModelEnergy(model), BATCH.x[:1], rng, 1)
        run(SGLD(), ModelEnergy(model), BATCH.x[:1], rng, 1)
    assert replay.recorded == 1


def test_on_a_cpu_nothing_is_replayed() -> None:
    assert replay_on(torch.device("cpu")) is None
