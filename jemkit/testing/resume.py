"""Tests with a user's recipe that an interrupted run equals an uninterrupted one.

A few steps of the recipe are trained without interruption, and again interrupted at several places,
each time saved and loaded in a new trainer; then every tensor and value of the states is compared
bit for bit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from jemkit.config.recipe import Recipe, Resolved, resolve, with_run
from jemkit.config.registry import Registry
from jemkit.errors import ConfigError, Preempted, UsageError
from jemkit.runtime import checkpoint
from jemkit.runtime.precision import device_of
from jemkit.runtime.pytree import differing
from jemkit.runtime.run_dir import RunFolder
from jemkit.training import pinned
from jemkit.training.build import splits_of
from jemkit.training.opened import open_model
from jemkit.training.pinned import CONFIG
from jemkit.training.run import resume_from
from jemkit.training.trainer import Trainer

LOOKED_AT = 8  # validation images under PGD after an epoch: enough to run what an epoch's end runs
CLOCK = ("seconds", "images/s")  # what the clock writes; all else is compared


class Cut(NamedTuple):
    """A run that was saved after `step` steps and loaded again, compared at its end."""

    step: int
    where: str
    differs: dict[str, str]  # part of the state: the first path of it that differs


class Verdict(NamedTuple):
    """The result of the comparison for each interruption."""

    device: str
    steps: int
    steps_per_epoch: int
    compared: dict[str, int]  # part of the state: how many tensors and values it holds
    cuts: list[Cut]

    @property
    def exact(self) -> bool:
        return not any(cut.differs for cut in self.cuts)


def verify_resume(
    resolved: Resolved,
    folder: Path,
    *,
    steps: int = 6,
    progress: Callable[[str], None] = lambda what: None,
    stop: Callable[[], bool] = lambda: False,
) -> Verdict:
    """Train `steps` steps with and without interruptions, in `folder`; report differing parts.

    Fewer training images are used, so that an epoch ends within these steps. Raises ConfigError on
    CUDA without deterministic algorithms, since there two runs of one recipe differ even without an
    interruption, and Preempted if `stop` returns true.
    """
    _check(resolved.recipe, steps)
    try:
        return _verified(resolved, folder, steps, progress, stop)
    except Preempted:
        raise Preempted(
            "stopped before everything was compared; the same command starts over"
        ) from None


def _verified(
    resolved: Resolved,
    folder: Path,
    steps: int,
    progress: Callable[[str], None],
    stop: Callable[[], bool],
) -> Verdict:
    short = _shortened(resolved, steps)
    progress("training whole")
    trainer = Trainer(short, RunFolder.create(folder / "whole"))
    trainer.stop = stop
    per_epoch = trainer.loader.steps_per_epoch
    trainer.run(until=steps)
    steps = trainer.step  # a data set may be too small for more
    whole = _ended(trainer)
    cuts = []
    for step, where in cut_points(steps, per_epoch):
        progress(f"training with a cut {where}")
        resumed = _ended(_cut(short, folder / f"cut-{step}", step, steps, stop))
        parts = sorted(whole.keys() | resumed.keys())
        first = {p: next(differing(whole.get(p), resumed.get(p), p), None) for p in parts}
        cuts.append(Cut(step, where, {part: at for part, at in first.items() if at}))
    compared = {part: len(tree_leaves(value)) for part, value in sorted(whole.items())}
    return Verdict(str(trainer.parts.device), steps, per_epoch, compared, cuts)


def check_run(folder: Path, registry: Registry) -> None:
    """Reject a run whose data or config.json have changed since it started."""
    recipe = resolve(registry, config=folder / CONFIG).recipe
    if checkpoint.newest(folder / "checkpoints"):
        open_model(folder, "last")
    splits_of(recipe, pinned.read(folder / CONFIG)).images("train")


def cut_points(steps: int, per_epoch: int) -> list[tuple[int, str]]:
    """Where to interrupt a run of `steps` steps: in its first epoch, at its end, in a later one."""
    later = per_epoch * ((steps - 1) // per_epoch) + 1
    cuts = {1, per_epoch, later} if per_epoch < steps else {1, steps // 2, steps - 1}
    ended = {step: divmod(step, per_epoch) for step in sorted(cuts) if 0 < step < steps}
    return [
        (step, f"within epoch {n + 1}, after step {step}" if more else
         f"at the end of epoch {n}, after step {step}")
        for step, (n, more) in ended.items()
    ]  # fmt: skip


def _check(recipe: Recipe, steps: int) -> None:
    if steps < 2:
        raise UsageError(f"{steps} step(s) cannot be interrupted; use 2 or more")
    if device_of(recipe.run.device).type == "cuda" and not recipe.run.deterministic:
        raise ConfigError(
            "this recipe runs on CUDA without deterministic algorithms: some kernels sum in a "
            "different order each time, so two runs differ even without an interruption. Use "
            "--deterministic, or --device cpu"
        )


def _shortened(resolved: Resolved, steps: int) -> Resolved:
    """The recipe with epochs of half as many steps, if the data set is large enough."""
    run, splits = resolved.recipe.run, splits_of(resolved.recipe)
    n_train, n_valid = len(splits.images("train").y), len(splits.images("valid").y)
    wanted = (steps // 2) * min(run.batch_size, n_train)
    n = wanted
    while n - round(n * run.valid_fraction) < wanted or round(n * run.valid_fraction) < 1:
        n += 1
    changed: dict[str, Any] = {
        "max_train": min(n, n_train + n_valid),
        "epochs": max(2, steps),
        "eval_images": min(run.eval_images, LOOKED_AT),
        "keep": 2,
    }
    untracked = resolved.recipe.model_copy(update={"trackers": {}})
    return with_run(resolved._replace(recipe=untracked), **changed)


def _cut(resolved: Resolved, path: Path, cut: int, steps: int, stop: Callable[[], bool]) -> Trainer:
    """Saved after `cut` steps and resumed, with torch's global generator in another state."""
    first = Trainer(resolved, RunFolder.create(path))
    first.stop = stop
    first.run(until=cut)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.empty(8).uniform_()
        trainer = Trainer(resolved, RunFolder(path))
        trainer.stop = stop
        resume_from(trainer, trainer.folder)
        trainer.run(until=steps)
    return trainer


def _ended(trainer: Trainer) -> dict[str, Any]:
    """The final state and the log of every step, without what depends on the clock."""
    state = {**trainer.state_dict(), "metrics": trainer.folder.metrics()}
    timeless: dict[str, Any] = _timeless(state)
    return timeless


def _timeless(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _timeless(v) for k, v in tree.items() if k not in CLOCK}
    return [_timeless(v) for v in tree] if isinstance(tree, list | tuple) else tree
