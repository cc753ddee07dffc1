"""The sentinel's laws: what it must see and what it must not; a rolled-back run repeats."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from states import timeless
from toys import objective_of, toy_recipe, toy_registry

from jemkit import Diverged, Options, Preempted, Terms, Trainer, hookimpl, train
from jemkit.config.registry import Plugin
from jemkit.runtime.checkpoint import complete, load, newest
from jemkit.runtime.divergence_monitor import Finding
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.training.rollback import RollbackPolicy, step_of
from jemkit.training.run import resume_from

EPOCH = 6  # steps


class Sickly(Options):
    """EB-JDAT, not finite from a step on, until chains have so many steps."""

    needs_density: ClassVar[bool] = True
    inner: ClassVar[Any] = objective_of("ebjdat")

    at: int = 13
    cured_by: int = 4

    def draw(self, backbone: Any, batch: Any, rng: torch.Generator) -> Any:
        return self.inner.draw(backbone, batch, rng)

    def loss(self, backbone: Any, batch: Any, draws: Any) -> Terms:
        terms = self.inner.loss(backbone, batch, draws)
        if batch.step < self.at or backbone.density.steps >= self.cured_by:
            return terms
        return terms._replace(total=terms.total * math.nan)


class Guest:
    @staticmethod
    @hookimpl
    def jemkit_objectives() -> dict[str, Any]:
        return {"sickly": Sickly}


REGISTRY = toy_registry([Plugin("guest", Guest)])
SICKLY = ("jem", "sickly", "plain", "run.epochs=3", 'sentinel.policy=["rate","steps"]')


def begun(path: Path, *given: str) -> Trainer:
    return Trainer(toy_recipe(REGISTRY, *given), RunFolder.create(path))


def go_on(path: Path, *given: str) -> Trainer:
    trainer = Trainer(toy_recipe(REGISTRY, *given), RunFolder(path))
    resume_from(trainer, trainer.folder)
    return trainer


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = (path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def after(polls: int) -> Callable[[], bool]:
    """Asks to stop when it is asked for the last of so many times."""
    counter = itertools.count(1)
    return lambda: next(counter) >= polls


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    begun(path, *SICKLY).run()
    return path


def state_of(path: Path) -> dict[str, Any]:
    last = newest(path / "checkpoints")
    assert last is not None
    return timeless(load(last))


def test_a_sick_run_goes_back_with_one_remedy_after_the_other(rolled_back: Path) -> None:
    rollbacks = events(rolled_back, "rollback")
    assert [event["remedy"] for event in rollbacks] == ["rate", "steps"]
    assert [event["with"] for event in rollbacks] == [
        "0.5 times the learning rate", "0.5 times the learning rate, 4 steps per chain",
    ]  # fmt: skip
    for event in rollbacks:
        assert (event["since"], event["to"]) == (13, 6)  # 12 was not proven for an epoch
        assert "not finite" in event["what"]
    rows = RunFolder(rolled_back).metrics()
    assert [int(row["step"]) for row in rows] == list(range(18))
    warm = {int(row["step"]): float(row["lr"]) for row in rows}
    assert warm[5] == 2 * warm[6]


def test_a_run_that_went_back_repeats_bit_for_bit(rolled_back: Path, tmp_path: Path) -> None:
    begun(tmp_path / "again", *SICKLY).run()
    assert same(state_of(tmp_path / "again"), state_of(rolled_back))


@pytest.mark.parametrize("cut", [3, 17, 25])
def test_a_run_that_went_back_and_was_stopped_is_the_run_that_was_not(
    rolled_back: Path, tmp_path: Path, cut: int
) -> None:
    """Thirteen steps, seven again from six on, and the last twelve."""
    trainer = begun(tmp_path / "cut", *SICKLY)
    trainer.stop = after(cut)
    with pytest.raises(Preempted):
        trainer.run()
    go_on(tmp_path / "cut", *SICKLY).run()
    assert same(state_of(tmp_path / "cut"), state_of(rolled_back))
    names = [[p.name for p in complete(path / "checkpoints")] for path in (tmp_path / "cut",
            rolled_back)]  # fmt: skip
    assert names[0] == names[1]


def test_another_attempt_draws_other_chains(rolled_back: Path, tmp_path: Path) -> None:
    begun(tmp_path / "well", *SICKLY, "objective.at=99").run(until=6)
    one = load(tmp_path / "well" / "checkpoints" / "step-00000006")
    other = load(rolled_back / "checkpoints" / "step-00000006")
    assert not torch.equal(one["rng"], other["rng"])
    assert same(one["loader"], other["loader"])
    assert same(one["model"], other["model"])


def test_a_run_that_is_sick_before_it_has_proven_anything_starts_over(tmp_path: Path) -> None:
    begun(tmp_path / "run", *SICKLY, "objective.at=3").run(until=EPOCH)
    assert [event["to"] for event in events(tmp_path / "run", "rollback")] == [0, 0]


def test_a_classifier_has_no_chains_to_lengthen_and_gets_a_lower_rate(tmp_path: Path) -> None:
    given = ("classifier", "ce", "plain", 'sentinel.policy=["steps","penalty"]')
    policy = begun(tmp_path / "run", *given).rollback
    policy.try_next(Finding("loss", 3, "not finite"), 3, 0)
    entry = policy.try_next(Finding("loss", 3, "not finite"), 3, 0)
    assert entry["remedy"] == "rate"
    assert policy.rate == 0.25


def test_a_penalty_is_put_on_the_density_and_saved(tmp_path: Path) -> None:
    given = ("jem", "jem", "plain", 'sentinel.policy=["penalty"]')
    trainer = begun(tmp_path / "run", *given)
    trainer.rollback.try_next(Finding("loss", 3, "not finite"), 3, 0)
    other = begun(tmp_path / "other", *given)
    other.load_state_dict(trainer.state_dict())
    assert other.backbone.density.options.penalty == 0.1


@pytest.mark.parametrize(
    ("backbone", "settings", "wanted"),
    [
        ("mebm", ['sentinel.policy=["penalty"]'], ["rate", "rate"]),  # its own is 0.5
        ("jem", ['sentinel.policy=["penalty"]'], ["penalty", "rate"]),
        ("jem", ['sentinel.policy=["penalty","penalty","steps"]'], ["penalty", "steps", "steps"]),
        ("mebm", ['sentinel.policy=["penalty","steps"]'], ["steps", "steps"]),
        ("jem", ['sentinel.policy=["steps"]', "backbone.steps=0"], ["rate", "rate"]),
        ("jem", ['sentinel.policy=["penalty"]', "backbone.density.penalty=0.1"], ["rate"]),
        ("jem", ['sentinel.policy=["penalty"]', "backbone.density.penalty=0.05"], ["penalty"]),
    ],
)
def test_a_remedy_that_would_change_nothing_is_passed_over(
    backbone: str, settings: list[str], wanted: list[str], tmp_path: Path
) -> None:
    policy = begun(tmp_path / "run", backbone, "jem", "plain", *settings).rollback
    entries = [policy.try_next(Finding("loss", 3, "not finite"), 3, 0) for _ in wanted]
    assert [entry["remedy"] for entry in entries] == wanted
    assert ("penalty" in entries[-1]["with"]) is ("penalty" in wanted)


def test_a_penalty_is_put_on_whatever_density_takes_one(tmp_path: Path) -> None:
    class Heavy:
        """A density that can be penalised, and says nothing of its options."""

        def __init__(self, inner: Any) -> None:
            self.inner, self.steps, self.sampler, self.start = inner, 2, inner.sampler, inner.start
            self.weights: list[float] = []

        def penalise(self, weight: float) -> None:
            self.weights.append(weight)

    trainer = begun(tmp_path / "run", "jem", "jem", "plain", 'sentinel.policy=["penalty"]')
    density = Heavy(trainer.backbone.density)
    trainer.backbone.density_or_none = density  # type: ignore[assignment]
    policy = RollbackPolicy(trainer.recipe.sentinel, trainer.parts, 0)
    assert policy.try_next(Finding("loss", 3, "not finite"), 3, 0)["remedy"] == "penalty"
    assert density.weights == [0.1]


def test_without_a_sentinel_a_sick_run_stops_at_once(tmp_path: Path) -> None:
    trainer = begun(tmp_path / "run", *SICKLY[:-1], "sentinel.on=false")
    with pytest.raises(Diverged, match=r"diverged at step 13.*the sentinel is off"):
        trainer.run()
    assert not events(tmp_path / "run", "rollback")


def test_a_run_may_always_go_back_as_far_as_a_finding_may_ask_it_to(tmp_path: Path) -> None:
    trainer = begun(tmp_path / "run", "jem", "jem", "plain", "run.epochs=8", "run.keep=1")
    trainer.run(until=7 * EPOCH)
    steps = [step_of(path) for path in complete(tmp_path / "run" / "checkpoints")]
    latest = (
        7 * EPOCH - EPOCH - trainer.rollback.options.patience
    )  # two epochs at chance, three strays
    assert steps == [24, 30, 36, 42]
    proven = next(trainer.rollback.proven(tmp_path / "run" / "checkpoints", latest))
    assert step_of(proven) == 24


STEPS = [
    ("sadajem", "ebjdat", "sam"), ("jempp", "jem", "awp"), ("jem", "ebjdat", "plain"),
    ("classifier", "pgdat", "sam", "run.theta_steps=2"),
]  # fmt: skip


@pytest.mark.parametrize("given", STEPS, ids=lambda given: "-".join(given[:3]))
def test_a_stop_in_the_midst_of_a_step_undoes_the_step_exactly(
    tmp_path: Path, given: tuple[str, ...]
) -> None:
    """Asked in every pass of the second step, until one has moved the weights."""
    trainer = begun(tmp_path / "run", *given)
    trainer.run(until=1)
    before, polls = load(tmp_path / "run" / "checkpoints" / "step-00000001"), 0
    for polls in range(1, 400):
        trainer = go_on(tmp_path / "run", *given)
        trainer.polling.patience, trainer.stop = 0.0, after(polls)
        try:
            trainer.run(until=2)
        except Preempted:
            assert trainer.step == 1
            assert same(timeless(trainer.state_dict()), timeless(before)), polls
            assert all(p.grad is None for p in trainer.backbone.model.parameters())
        else:
            break
    assert 4 < polls < 399


def test_a_stop_while_the_best_epoch_is_evaluated_ends_it_and_a_resume_evaluates_again(
    tmp_path: Path,
) -> None:
    trainer = begun(tmp_path / "run", "jem", "jem", "plain")
    trainer.run()
    trainer.polling.patience, trainer.stop = 0.0, after(9)
    with pytest.raises(Preempted, match="during the final evaluation; continue with --resume"):
        trainer.finish()
    assert events(tmp_path / "run", "preempted")
    again = go_on(tmp_path / "run", "jem", "jem", "plain")
    again.run()
    figures = again.finish().figures
    assert [figure.value for figure in figures] == [
        f.value for f in trainer.validator(0).judge({}).figures
    ]


def test_a_stop_during_validation_loses_no_epoch(tmp_path: Path) -> None:
    given = ("sadajem", "ebjdat", "plain")
    begun(tmp_path / "whole", *given).run(until=8)
    trainer = begun(tmp_path / "cut", *given)
    trainer.run(until=5)
    polls = 0
    trainer.polling.patience = 0.0

    def stop() -> bool:
        nonlocal polls
        polls += trainer.guard.updates == EPOCH  # the exam, and no step
        return polls > 12

    trainer.stop = stop
    with pytest.raises(Preempted, match="stopped at step 6"):
        trainer.run(until=8)
    assert trainer.history == []
    go_on(tmp_path / "cut", *given).run(until=8)
    assert same(state_of(tmp_path / "cut"), state_of(tmp_path / "whole"))
    assert [event["epoch"] for event in events(tmp_path / "cut", "epoch")] == [1]


def test_a_whole_command_ends_with_exit_code_4_and_a_diagnosis(tmp_path: Path) -> None:
    recipe = toy_recipe(REGISTRY, *SICKLY, "objective.cured_by=99", "sentinel.tries=1")
    with pytest.raises(Diverged) as caught:
        train(recipe, tmp_path / "run", registry=REGISTRY)
    assert caught.value.exit_code == 4
    assert "attempt 1 rolled back from step 13 to 6, continued with 0.5" in str(caught.value)
    assert "step-00000006 starts from its weights, of step 6" in str(caught.value)
