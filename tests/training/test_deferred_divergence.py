"""A GPU's optimizer skips an update that is not finite, and the host learns of it a step later.

Here the same on the CPU, whose fused optimizer can skip one, too. Until the host knows, running
statistics and the replay buffer hold what was not finite; no checkpoint ever does.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_leaves
from toys import backbone_of, gen, objective_of, toy_recipe, toy_registry

from jemkit import Diverged, Guard, Options, Plain, Terms, Trainer, hookimpl, train_step
from jemkit.config.registry import Plugin
from jemkit.errors import NotFinite
from jemkit.runtime.checkpoint import complete, load
from jemkit.runtime.divergence_monitor import Finding
from jemkit.runtime.run_dir import RunFolder
from jemkit.testing import toy_batch, toy_task
from jemkit.training.build import build_run
from jemkit.training.rollback import RollbackPolicy, step_of
from jemkit.training.validation import Validator

EPOCH, AT = 6, 8  # steps; the one that is not finite
TASK = toy_task()


class Deferring(Guard):
    """The guard as it is on a GPU."""

    def defers(self, optimizer: Optimizer, finite: Tensor) -> bool:
        return bool(optimizer.defaults.get("fused"))


class Poisoned(Options):
    """An objective that from a step on fills batch norm and buffer with NaN."""

    needs_density: ClassVar[bool] = True
    inner: Any = None
    at: int = AT

    def draw(self, backbone: Any, batch: Any, rng: Any) -> Any:
        draws = objective_of("jem").draw(backbone, batch, rng)
        if batch.step == self.at:
            buffer = backbone.density.buffer
            buffer.store(torch.arange(3), buffer.states[:3] * math.nan)
        return draws

    def loss(self, backbone: Any, batch: Any, draws: Any) -> Terms:
        spoilt = batch._replace(x=batch.x * (math.nan if batch.step == self.at else 1))
        return objective_of("jem").loss(backbone, spoilt, draws)


class Guest:
    @staticmethod
    @hookimpl
    def jemkit_objectives() -> dict[str, Any]:
        return {"poisoned": Poisoned}


REGISTRY = toy_registry([Plugin("guest", Guest)])


def begun(path: Path, *given: str) -> Trainer:
    """A run whose updates are skipped by the optimizer."""
    recipe = toy_recipe(REGISTRY, "jem", "poisoned", "plain", *given)
    trainer = Trainer(recipe, RunFolder.create(path))
    fused(trainer.optimizer)
    trainer.guard = Deferring()
    return trainer


def fused(optimizer: Optimizer) -> None:
    """What `fused=True` sets where an optimizer is made."""
    optimizer.defaults["fused"] = True
    optimizer._step_supports_amp_scaling = True
    optimizer._need_device_dtype_check_for_fused = True
    for group in optimizer.param_groups:
        group |= {"fused": True, "foreach": False}


def broken(state: Any) -> bool:
    """Whether any tensor of a state holds what is not finite; the sentinel's own say "not yet"."""
    of = {name: part for name, part in state.items() if name != "care"}
    tensors = [t for t in tree_leaves(of) if isinstance(t, Tensor) and t.is_floating_point()]
    return not all(t.isfinite().all() for t in tensors)


def saved(path: Path) -> dict[int, bool]:
    """The steps that checkpoints of a run are of, and whether they are broken."""
    return {step_of(p): broken(load(p)) for p in complete(path / "checkpoints")}


def test_the_stand_in_skips_an_update_and_says_so_a_step_later() -> None:
    backbone, guard, batch = backbone_of("jem"), Deferring(), toy_batch(TASK)
    updater = Plain().build(
        backbone.model, SGD(backbone.model.parameters(), lr=0.05, momentum=0.9, fused=True)
    )
    objective, rng = Poisoned(at=1), gen()
    train_step(backbone, objective, updater, batch._replace(step=0), rng, guard)
    before = [p.detach().clone() for p in backbone.model.parameters()]
    train_step(backbone, objective, updater, batch._replace(step=1), rng, guard)
    assert all(map(torch.equal, before, backbone.model.parameters()))
    assert broken(backbone.model.state_dict())
    assert broken(backbone.density.state_dict())
    with pytest.raises(Diverged, match="update 2: not finite"):
        train_step(backbone, objective, updater, batch._replace(step=2), rng, guard)
    for _ in range(2):
        with pytest.raises(Diverged, match="update 2: not finite"):
            guard.settle()


def test_without_the_sentinel_every_checkpoint_is_of_finite_values(tmp_path: Path) -> None:
    trainer = begun(tmp_path / "run", "sentinel.on=false", "run.ema_decay=0.9")
    with pytest.raises(Diverged, match="the sentinel is off"):
        trainer.run()
    assert broken(trainer.state_dict())
    assert saved(tmp_path / "run") == {EPOCH: False}
    assert not broken(load(tmp_path / "run" / "checkpoints" / "best"))
    with pytest.raises(Diverged):
        trainer.save()
    assert saved(tmp_path / "run") == {EPOCH: False}


@pytest.mark.parametrize("option", ["sentinel.on=false", "sentinel.tries=0"])
def test_a_stop_between_the_update_and_the_news_of_it_saves_nothing(
    tmp_path: Path, option: str
) -> None:
    trainer = begun(tmp_path / "run", option)
    trainer.stop = lambda: trainer.step == AT + 1
    with pytest.raises(Diverged):
        trainer.run()
    assert trainer.step == AT + 1
    assert saved(tmp_path / "run") == (
        {EPOCH: False} if "on=" in option else {0: False, EPOCH: False}
    )


def test_the_last_step_of_an_epoch_is_no_exception(tmp_path: Path) -> None:
    trainer = begun(tmp_path / "run", "sentinel.on=false", f"objective.at={EPOCH - 1}")
    with pytest.raises(Diverged):
        trainer.run()
    assert saved(tmp_path / "run") == {}


def test_with_the_sentinel_a_run_goes_on_from_finite_values(tmp_path: Path) -> None:
    trainer, sick = begun(tmp_path / "run"), list[bool]()

    def watch(kind: str, _: dict[str, Any]) -> None:
        if kind == "rollback":
            sick.append(broken(trainer.state_dict()))
            trainer.guard = Deferring()  # the run's is a new one

    trainer.watch = watch
    with pytest.raises(Diverged):  # the same at every attempt
        trainer.run()
    assert sick == 3 * [False]
    assert saved(tmp_path / "run") == {0: False, EPOCH: False}


def test_outputs_that_are_not_finite_in_validation_lead_to_a_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate, calls, kinds = Validator.validate, list[int](), list[str]()

    def once(self: Validator, n: int) -> dict[str, float]:
        calls.append(n)
        if len(calls) == 1:
            raise NotFinite("the model's logits contain NaN or inf on clean images")
        return validate(self, n)

    monkeypatch.setattr(Validator, "validate", once)
    recipe = toy_recipe(REGISTRY, "classifier", "ce", "plain")
    trainer = Trainer(
        recipe, RunFolder.create(tmp_path / "run"), lambda kind, _: kinds.append(kind)
    )
    trainer.run()
    assert kinds.count("rollback") == 1
    (tried,) = trainer.rollback.tried
    assert (tried["signal"], tried["to"], tried["step"]) == ("outputs", 0, EPOCH)
    assert trainer.step == trainer.total_steps


def test_no_step_is_taken_up_to_step_zero(tmp_path: Path) -> None:
    trainer = Trainer(toy_recipe(REGISTRY, "classifier", "ce"), RunFolder.create(tmp_path / "run"))
    trainer.run(until=0)
    assert trainer.step == 0


@pytest.mark.parametrize(("parts", "remedy"), [
    (("jem", "jem"), "steps"), (("dat", "dat"), "rate"), (("classifier", "ce"), "rate"),
])  # fmt: skip
def test_longer_chains_are_a_remedy_where_the_backbone_sets_their_length(
    parts: tuple[str, str], remedy: str
) -> None:
    recipe = toy_recipe(REGISTRY, *parts, "plain", 'sentinel.policy=["steps"]').recipe
    policy = RollbackPolicy(recipe.sentinel, build_run(recipe), 0)
    entry = policy.try_next(Finding("outputs", 0, "not finite"), 3, 0)
    assert entry["remedy"] == remedy
    assert ("steps per chain" in entry["with"]) == (remedy == "steps")
