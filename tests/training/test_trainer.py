"""A step is a transaction, a run keeps what it promises, and the test split is read last."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import (
    Toy,
    backbone_of,
    gen,
    objective_of,
    toy_recipe,
    toy_registry,
    updater_of,
)

from jemkit import (
    PYLD,
    Backbone,
    Diverged,
    Guard,
    Images,
    MisfitError,
    Options,
    Preempted,
    Terms,
    Trainer,
    check,
    hookimpl,
    train,
    train_step,
)
from jemkit.config.registry import Plugin
from jemkit.models.networks import SmallCNN
from jemkit.runtime.checkpoint import load
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.testing import toy_batch, toy_task

TASK = toy_task()
BATCH = toy_batch(TASK)
REGISTRY = toy_registry()
CLOCK = ("seconds", "history", "config")
"""What the clock writes of a state, and what names the data set."""


class Stop(Exception):
    """Something that goes wrong in the midst of a step."""


class Broken:
    """An objective that fails where it is told to."""

    needs_density = True

    def __init__(self, at: str, how: BaseException | float) -> None:
        self.inner, self.at, self.how, self.calls = objective_of("ebjdat"), at, how, 0

    def draw(self, *arguments: Any) -> Any:
        draws = self.inner.draw(*arguments)
        if self.at == "draw":
            raise self.how
        return draws

    def loss(self, *arguments: Any) -> Terms:
        terms = self.inner.loss(*arguments)
        self.calls += 1
        if self.at == "loss" and isinstance(self.how, float):
            return terms._replace(total=terms.total * self.how)
        if self.at == "loss":
            raise self.how
        return terms


@pytest.mark.parametrize("name", ["jem", "jempp", "mebm", "sadajem"])
@pytest.mark.parametrize(("at", "how", "error"), [
    ("draw", Stop(), Stop), ("loss", Stop(), Stop),
    ("loss", KeyboardInterrupt(), KeyboardInterrupt),
    ("loss", float("nan"), Diverged), ("loss", float("inf"), Diverged),
])  # fmt: skip
def test_a_step_that_fails_leaves_buffer_generator_and_weights_as_before_it(
    name: str, at: str, how: Any, error: type[BaseException]
) -> None:
    backbone, rng = backbone_of(name), gen(3)
    updater, guard = updater_of("sam", backbone.model), Guard()
    train_step(backbone, objective_of("ebjdat"), updater, BATCH, rng, guard)
    weights = {n: p.detach().clone() for n, p in backbone.model.named_parameters()}
    states, before = backbone.density.buffer.states.clone(), rng.get_state()
    drawn = backbone.density.buffer.chains_begun
    with pytest.raises(error):
        train_step(backbone, Broken(at, how), updater, BATCH, rng, guard)
    assert same(dict(backbone.model.named_parameters()), weights)
    assert torch.equal(backbone.density.buffer.states, states)
    assert backbone.density.buffer.chains_begun == drawn
    assert torch.equal(rng.get_state(), before)


def test_a_failed_step_can_be_taken_again_as_if_it_had_not_been_tried() -> None:
    ends = []
    for fail in (False, True):
        backbone, rng = backbone_of("jem", network=SmallCNN(channels=2)), gen(3)
        updater, guard = updater_of("plain", backbone.model), Guard()
        if fail:
            with pytest.raises(Stop):
                train_step(backbone, Broken("loss", Stop()), updater, BATCH, rng, guard)
        for _ in range(2):
            train_step(backbone, objective_of("ebjdat"), updater, BATCH, rng, guard)
        ends.append([backbone.model.state_dict(), backbone.density.state_dict()])
    assert same(ends[0], ends[1])


@given(steps=st.integers(1, 4))
def test_m_theta_moves_the_weights_as_often_on_the_same_draws(steps: int) -> None:
    backbone, other = (backbone_of("jem", network=SmallCNN(channels=2)) for _ in range(2))
    objective, guard = objective_of("jem"), Guard()
    updater = updater_of("plain", backbone.model)
    train_step(backbone, objective, updater, BATCH, gen(), guard, theta_steps=steps)
    assert guard.updates == steps
    draws = objective.draw(other, BATCH, gen())
    by_hand = updater_of("plain", other.model)
    for _ in range(steps):
        by_hand.step(lambda: objective.loss(other, BATCH, draws), Guard())
    assert same(backbone.model.state_dict(), other.model.state_dict())
    assert same(backbone.density.state_dict(), other.density.state_dict())


class Remembers(Options):
    """An objective with a teacher: the mean logits so far."""

    needs_density: bool = False

    def build(self, task: Any, rng: torch.Generator) -> "Memory":
        return Memory(task.n_classes)


class Memory:
    needs_density = False

    def __init__(self, n_classes: int) -> None:
        self.mean, self.extra = torch.zeros(n_classes), torch.nn.Parameter(torch.ones(()))

    def draw(self, backbone: Backbone, batch: Any, rng: torch.Generator) -> None:
        return None

    def loss(self, backbone: Backbone, batch: Any, draws: None) -> Terms:
        logits = backbone.scores({"x": batch.x})["x"].logits
        far = (logits - self.mean).square().mean()
        return Terms.weighted({"far": (1.0, far + 0.1 * self.extra.square())})

    def after(self, backbone: Backbone, batch: Any, draws: None, rng: torch.Generator) -> None:
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * backbone.model(batch.x).logits.mean(0)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.extra]

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "extra": self.extra.detach().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean = state["mean"].clone()
        with torch.no_grad():
            self.extra.copy_(state["extra"])


class Guest:
    """Offers the objective that remembers."""

    @staticmethod
    @hookimpl
    def jemkit_objectives() -> dict[str, Any]:
        return {"remembers": Remembers}


def test_an_objective_with_memory_moves_it_once_after_the_update() -> None:
    backbone, memory = backbone_of("classifier"), Memory(3)
    updater = updater_of("sam", backbone.model)
    train_step(backbone, memory, updater, BATCH, gen(), Guard(), theta_steps=2)
    once = backbone.model(BATCH.x).logits.mean(0).detach()
    torch.testing.assert_close(memory.mean, 0.1 * once, rtol=1e-4, atol=1e-5)


def test_tf32_on_a_cpu_warns_that_there_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for precision, warnings in (("fp32", 0), ("tf32", 1)):
        caplog.clear()
        resolved = toy_recipe(REGISTRY, "classifier", "ce", "plain", f"run.precision={precision}")
        Trainer(resolved, RunFolder.create(tmp_path / precision))
        assert caplog.text.count("this run would compute in fp32") == warnings


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_objective_with_memory_is_trained_saved_and_gone_on_with(
    tmp_path: Path, precision: str
) -> None:
    registry = toy_registry([Plugin("guest", Guest)])
    names = ("classifier", "remembers", "plain", f"run.precision={precision}")
    ends = []
    for cut in (None, 4):
        folder = RunFolder.create(tmp_path / f"run-{cut}")
        trainer = Trainer(toy_recipe(registry, *names), folder)
        if cut:
            trainer.run(until=cut)
            state = trainer.state_dict()
            trainer = Trainer(toy_recipe(registry, *names), folder)
            trainer.load_state_dict(state)
        trainer.run(until=8)
        ends.append(trainer.state_dict())
    assert ends[0]["objective"]["mean"].abs().sum() > 0
    assert float(ends[0]["objective"]["extra"]) < 1
    for key in ("model", "objective", "optimizer", "rng", "loader"):
        assert same(ends[0][key], ends[1][key]), key


def test_parts_that_do_not_fit_are_refused_with_what_would() -> None:
    for name in ("ebjdat", "jem"):
        with pytest.raises(MisfitError, match=f"the objective '{name}' learns p"):
            check(backbone_of("classifier"), objective_of(name))
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    adapted = Backbone.of_module(
        module, shape=TASK.shape, n_classes=3, rng=gen(), sampler=PYLD()
    )  # fmt: skip
    with pytest.raises(MisfitError, match="PYLD differentiates through the first layer"):
        check(adapted, objective_of("jem"))


class Recorder(Toy):
    """The toy data set, with a note of what was read of it, and with other test images."""

    inverted: bool = False  # the test images

    def load(self, split: str) -> Images:
        READ.append(split)
        images = super().load(split)
        if not (self.inverted and split == "test"):
            return images
        return Images(1 - images.unit(), images.y)


READ: list[str] = []


class RecorderPlugin:
    @staticmethod
    @hookimpl
    def jemkit_datasets() -> dict[str, Any]:
        return {"recorder": Recorder}


def test_the_test_split_is_read_once_and_changes_nothing_before_the_end(tmp_path: Path) -> None:
    registry = toy_registry([Plugin("recorder", RecorderPlugin)])
    ends = []
    for i, inverted in enumerate(("false", "true")):
        chosen = ("data.use=recorder", f"data.inverted={inverted}")
        recipe = toy_recipe(registry, "jem", "ebjdat", "plain", *chosen)
        READ.clear()
        train(recipe, tmp_path / f"{i}", registry=registry)
        assert READ.count("test") == 1
        states = [load(tmp_path / f"{i}" / "checkpoints" / n) for n in ("step-00000012", "best")]
        ends.append([{k: v for k, v in s.items() if k not in CLOCK} for s in states])
    assert same(*ends)


def test_a_run_that_diverges_stops_with_its_step_its_term_and_its_last_checkpoint(
    tmp_path: Path,
) -> None:
    folder = RunFolder.create(tmp_path / "run")
    trainer = Trainer(toy_recipe(REGISTRY, "jem", "ebjdat"), folder)
    trainer.run(until=3)
    weights = {n: p.detach().clone() for n, p in trainer.backbone.model.named_parameters()}
    trainer.loader.images = trainer.loader.images._replace(
        x=trainer.loader.images.unit() * float("nan")
    )
    with pytest.raises(Diverged) as caught:
        trainer.run()
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "p(x) = nan" in message
    assert "step-00000003" in message
    assert same(dict(trainer.backbone.model.named_parameters()), weights)
    events = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "diverged"


def test_a_run_can_be_stopped_between_steps_and_gone_on_with(tmp_path: Path) -> None:
    stops = iter([False] * 4 + [True])
    out = tmp_path / "run"
    with pytest.raises(Preempted, match="stopped at step 4"):
        train(toy_recipe(REGISTRY), out, registry=REGISTRY, stop=lambda: next(stops))
    summary = train(toy_recipe(REGISTRY), out, registry=REGISTRY, resume=True)
    whole = train(toy_recipe(REGISTRY), tmp_path / "whole", registry=REGISTRY)
    assert [int(row["step"]) for row in RunFolder(out).metrics()] == list(range(12))
    ends = [{f.name: f.value for f in s.figures} for s in (summary, whole)]
    assert ends[0] == ends[1]


def test_chains_and_validation_never_move_the_data_or_each_other(tmp_path: Path) -> None:
    """Another number of chain steps gives the same batches; a grid takes nothing from a run."""
    orders = []
    for i, steps in enumerate((1, 4)):
        recipe = toy_recipe(REGISTRY, "jem", "jem", "plain", f"backbone.steps={steps}")
        trainer = Trainer(recipe, RunFolder.create(tmp_path / f"{i}"))
        batches = []
        for _ in range(7):
            batches.append(trainer.loader.batch().x)
            trainer.backbone.density.draw(trainer.backbone.model, 4, trainer.rng)
        orders.append(batches)
    assert same(*orders)
    before, loader = trainer.rng.get_state(), trainer.loader.rng.get_state()
    states = trainer.backbone.density.buffer.states.clone()
    trainer.validator(1).validate(6)
    trainer.validator(1).draw_grid(tmp_path / "grid.png")
    assert torch.equal(trainer.rng.get_state(), before)
    assert torch.equal(trainer.loader.rng.get_state(), loader)
    assert torch.equal(trainer.backbone.density.buffer.states, states)


def test_a_run_of_one_seed_repeats_and_of_another_differs(tmp_path: Path) -> None:
    ends = []
    for i, seed in enumerate((0, 0, 1)):
        recipe = toy_recipe(REGISTRY, "sadajem", "ebjdat", "sam", f"run.seed={seed}")
        trainer = Trainer(recipe, RunFolder.create(tmp_path / f"{i}"))
        trainer.run(until=2)
        ends.append(trainer.state_dict())
    assert same(ends[0]["model"], ends[1]["model"])
    assert not same(ends[0]["model"], ends[2]["model"])


def test_building_a_run_teaches_batch_norm_nothing(tmp_path: Path) -> None:
    recipe = toy_recipe(REGISTRY, "sadajem", "ebjdat", "plain", "objective.distance.use=logits")
    trainer = Trainer(recipe, RunFolder(tmp_path))
    assert not trainer.backbone.model.network.norm1.running_mean.any()
    assert not list(tmp_path.iterdir())


def test_the_average_follows_weights_closely_at_first(tmp_path: Path) -> None:
    options = ["run.ema_decay=0.9", "run.ema_warmup=true"]
    recipe = toy_recipe(REGISTRY, "jem", "ce", "plain", *options)
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run"))
    averages = []
    for decay in (0.1, 2 / 11):
        before = {n: t.clone() for n, t in trainer.ema.average.items()} if trainer.ema else {}
        trainer.one_step()
        live, average = trainer.backbone.model.state_dict(), trainer.ema and trainer.ema.average
        name = "head.weight"
        expected = decay * before[name] + (1 - decay) * live[name]
        torch.testing.assert_close((average or {})[name], expected)
        averages.append(expected)
    assert not torch.equal(*averages)


def test_the_average_is_a_copy_in_the_first_share_of_a_run(tmp_path: Path) -> None:
    options = ["run.ema_decay=0.9", "run.ema_warmup=true", "run.ema_copy=0.25"]  # 3 of 12 steps
    recipe = toy_recipe(REGISTRY, "jem", "ce", "plain", *options)
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run"))
    assert trainer.ema is not None
    for decay in (0, 0, 0, 0.1, 2 / 11):
        before = trainer.ema.average["head.weight"].clone()
        trainer.one_step()
        live = trainer.backbone.model.state_dict()["head.weight"]
        wanted = decay * before + (1 - decay) * live
        torch.testing.assert_close(trainer.ema.average["head.weight"], wanted)
        assert torch.equal(trainer.ema.average["head.weight"], live) == (decay == 0)


def test_a_run_of_every_objective_takes_a_first_step(tmp_path: Path) -> None:
    for name in ("ce", "pgdat", "trades", "jem", "ebjdat"):
        folder = RunFolder.create(tmp_path / name)
        trainer = Trainer(toy_recipe(REGISTRY, "jempp", name), folder)
        trainer.one_step()
        assert trainer.step == 1


def test_a_diverged_step_leaves_batch_norm_as_it_was() -> None:
    network = SmallCNN(channels=4, norm="batch")
    backbone = backbone_of("sadajem", network=network)
    backbone.model.train()
    sick = BATCH._replace(x=BATCH.x * float("nan"))
    before = {name: t.clone() for name, t in backbone.model.named_buffers()}
    updater = updater_of("plain", backbone.model)
    with pytest.raises(Diverged):
        train_step(backbone, objective_of("ebjdat"), updater, sick, gen(), Guard())
    assert before
    for name, t in backbone.model.named_buffers():
        assert torch.equal(t, before[name]), name
