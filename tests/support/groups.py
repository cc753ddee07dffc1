"""Runs and batches of several processes, for the tests of groups."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from toys import gen, objective_of, toy_recipe, toy_registry, toy_task

from jemkit import Backbone, Batch, Options, Preempted, Terms, hookimpl, train
from jemkit.config.registry import Plugin
from jemkit.runtime import distributed
from jemkit.runtime.checkpoint import load
from jemkit.runtime.pytree import differing
from jemkit.runtime.work_cache import Shard
from jemkit.testing import toy_batch

TASK = toy_task()


def part_of(tensors: Any, me: Shard) -> Any:
    """A named tuple's rows of one process; what is None or a number stays."""
    rows = slice(me.rank, None, me.size)
    return type(tensors)(*(t[rows] if isinstance(t, Tensor) else t for t in tensors))


def batch_of(step: int) -> Batch:
    """Eight other images a step."""
    whole = toy_batch(TASK, 24)
    index = torch.randperm(24, generator=gen(step))[:8]
    return Batch(whole.x[index], whole.y[index], whole.x_pos[index], index, step)


def squared(backbone: Backbone) -> Backbone:
    """The same with a penalty on squared mean energies, which no average of gradients gives."""
    density: Any = backbone.density
    density.options = density.options.model_copy(update={"penalty": 0.3})
    return backbone


STEPS_OF: dict[str, list[int]] = defaultdict(list)
"""The steps that each run's objective was asked for in this process, in order."""


class Faulty(Options):
    """An objective whose loss is not finite at step SICK, the first time that it comes there.

    Before that, `harmed`, it pushes the second process's chains to the edge of the pixel range.
    """

    needs_density: ClassVar[bool] = True
    inner: ClassVar[Any] = objective_of("ebjdat")

    name: str
    harmed: bool = False

    def draw(self, backbone: Any, batch: Any, rng: torch.Generator) -> Any:
        STEPS_OF[self.name].append(batch.step)
        if self.harmed and batch.step == EPOCH - 1 and distributed.shard().rank == 1:
            backbone.density.buffer.states.sign_()
        return self.inner.draw(backbone, batch, rng)

    def loss(self, backbone: Any, batch: Any, draws: Any) -> Terms:
        terms = self.inner.loss(backbone, batch, draws)
        if batch.step == SICK and STEPS_OF[self.name].count(SICK) == 1:
            return terms._replace(total=terms.total * torch.nan)
        return terms


class Guest:
    @staticmethod
    @hookimpl
    def jemkit_objectives() -> dict[str, Any]:
        return {"faulty": Faulty}


REGISTRY = toy_registry([Plugin("guest", Guest)])


STEPS, EPOCH, CUT, SICK = 6, 3, 2, 7
"""Steps of a run and of an epoch; where runs are cut, and where the loss is not finite."""


SMALL = ("run.batch_size=8", "run.max_train=27", "objective.adv_steps=1")


def recipe(*overrides: str) -> Any:
    """Two epochs of three steps; batch norm, a penalty on squared means, SAM."""
    options = ("backbone.density.penalty=0.1", *SMALL, *overrides)
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


def end_of(run: Path) -> dict[str, Any]:
    return load(run / "checkpoints" / f"step-{STEPS:08d}")


def different(one: Path, other: Path) -> list[str]:
    """Where two runs' ends differ but for what a clock told."""
    differences = differing(end_of(one), end_of(other))
    return [at for at in differences if "seconds" not in at]


DIGITS = (
    "train", "--dataset", "digits", "--epochs", "2", "--batch-size", "32", "--device", "cpu",
    "--set", "run.max_train=320", "--set", "backbone.buffer.capacity=200",
    "--set", "backbone.steps=2", "--set", "run.eval_images=16",
)  # fmt: skip
