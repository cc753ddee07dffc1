"""A run in its folder: start or resume, train, evaluate."""

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from jemkit.config.recipe import Recipe, Resolved, complete
from jemkit.config.registry import Registry
from jemkit.errors import DataError, JemkitError, memory_ran_out
from jemkit.runtime import checkpoint, disk, distributed
from jemkit.runtime.files import write_json
from jemkit.runtime.lock import LOCK, locked
from jemkit.runtime.precision import device_of
from jemkit.runtime.run_dir import RunFolder
from jemkit.training import pinned, resuming
from jemkit.training.follower import follow
from jemkit.training.initial_weights import check_same, doubts, initial, initial_source
from jemkit.training.leader import leading, losses_told
from jemkit.training.synchronisation import begin_with
from jemkit.training.trainer import Summary, Trainer, Watch

log = logging.getLogger(__name__)


def train(
    resolved: Resolved,
    out: Path,
    *,
    registry: Registry,
    resume: bool = False,
    init_from: Path | None = None,
    watch: Watch | None = None,
    stop: Callable[[], bool] | None = None,
    latest: Path | None = None,
    free: Callable[[Path], int] = disk.free_bytes,
    patience: disk.Patience | None = None,
) -> Summary:
    """Train a recipe into the folder `out` and evaluate its best epoch on the test split.

    A link `latest` points to the run. If the disk is full, writing waits for space (`patience`).
    Raises ConfigError or DataError before the first step, Diverged, or Preempted once the run is
    saved.
    """
    whole, doing = complete(resolved, registry), f"has trained in {out}"
    with ExitStack() as held:
        held.enter_context(distributed.group(device_of(whole.recipe.run.device).type))
        held.enter_context(losses_told())
        if distributed.shard().rank:
            return follow(whole.recipe, out)
        held.enter_context(leading())
        resume = resume or (distributed.restarted() and (out / "config.json").exists())
        if resume:
            RunFolder.open(out)
            held.enter_context(locked(out / LOCK, doing))
            trainer, going = _resumed(whole, RunFolder(out), registry, init_from, watch, stop)
            begin = partial(_go_on, trainer, going)
        else:
            RunFolder.check_links(out)
            trainer, warnings = _fresh(whole, RunFolder(out), init_from, watch, stop)
            begin = partial(_begin, trainer, whole, pinned.pin(trainer.splits), init_from, warnings)
        tight = disk.check_room(out, still_needed(trainer), free=free)
        held.enter_context(disk.waiting(patience or disk.Patience(trainer.stop)))
        if not resume:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out / LOCK, doing))
        begin()
        trainer.folder.link_latest(latest or out.parent)
        trainer.folder.event("resume" if resume else "start", step=trainer.step)
        if tight is not None:
            _tell(trainer.folder, "disk", tight)
        trainer.writer.ready(trainer.state_dict())
        trainer.run()
        return trainer.finish()


def _fresh(
    whole: Resolved,
    folder: RunFolder,
    init_from: Path | None,
    watch: Watch | None,
    stop: Callable[[], bool] | None,
) -> tuple[Trainer, list[str]]:
    """A new run before its first step, and what to report about it; nothing is written yet."""
    if not unborn(folder.path):
        RunFolder.check_vacant(folder.path)
    trainer = Trainer(whole, folder, watch)
    if stop is not None:
        trainer.stop = stop
    if init_from is None:
        return trainer, []
    start = initial(init_from)
    begin_with(trainer.parts, start.weights)
    return trainer, doubts(start, trainer.recipe, trainer.total_steps)


def _resumed(
    whole: Resolved,
    folder: RunFolder,
    registry: Registry,
    init_from: Path | None,
    watch: Watch | None,
    stop: Callable[[], bool] | None,
) -> tuple[Trainer, resuming.Agreed]:
    """A run in the state of its newest checkpoint, with its recipe and its data."""
    checkpoint.recover(folder.checkpoints)
    found = checkpoint.sound(folder.checkpoints)
    going = resuming.agreed(whole, folder.path, found.state, found.path, registry)
    if init_from is not None:
        check_same(init_from, going.config)
    trainer = Trainer(
        going.resolved, folder, watch, pinned=pinned.read(folder.path / pinned.CONFIG)
    )
    trainer.splits.images("test")  # rejected now, not at the final evaluation
    if stop is not None:
        trainer.stop = stop
    resume_from(trainer, folder, found)
    trainer.config = {name: going.config[name] for name in KEPT if name in going.config}
    return trainer, going


def _go_on(trainer: Trainer, going: resuming.Agreed) -> None:
    """Store the recipe with which a run resumes, if it changed."""
    before, now = going.epochs, trainer.recipe.run.epochs
    if now > before:
        rate = trainer.recipe.optimizer.lr * trainer.care.rate
        totals = (trainer.total_steps // now * before, trainer.total_steps)
        factor = trainer.recipe.schedule.factor
        rates = [rate * factor(min(trainer.step, total - 1), total) for total in totals]
        _tell(trainer.folder, "extended", resuming.extension(before, now, (rates[0], rates[1])))
    if going.changed:
        write_json(trainer.folder.path / pinned.CONFIG, going.config)


KEPT = ("recipe", "data")
"""The part of config.json that a checkpoint stores, so that a change is detected."""


def _begin(
    trainer: Trainer,
    whole: Resolved,
    data: tuple[pinned.Table, pinned.Details],
    init_from: Path | None,
    warnings: list[str],
) -> None:
    """Make the folder a run: config.json is written last, when there is a checkpoint to resume
    from."""
    folder = trainer.folder
    if not unborn(folder.path):  # another process was faster
        RunFolder.check_vacant(folder.path)
    for part in (folder.checkpoints, folder.samples):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    for litter in (p for name in WRITTEN for p in folder.path.glob(f".{name}.*")):
        litter.unlink()
    table = pinned.write(folder.path, *data)
    trainer.config = {"recipe": whole.tables, "data": table}
    checkpoint.save(folder.checkpoints / f"step-{trainer.step:08d}", trainer.state_dict())
    weights = {} if init_from is None else {"init_from": initial_source(init_from)}
    folder.write_config(whole.tables, whole.origins, data=table, **weights)
    for warning in warnings:
        _tell(folder, "init_from", warning)


WRITTEN = (pinned.CONFIG, pinned.DETAILS)
"""Files that are written before a run has its config.json."""


def unborn(out: Path) -> bool:
    """Whether a folder is the remainder of a run that was killed before it started."""
    if not (out / LOCK).is_file():
        return False
    litter = tuple(f".{name}." for name in WRITTEN)
    names = {p.name for p in out.iterdir() if not p.name.startswith(litter)}
    steps = {p.name for p in (out / "checkpoints").glob("[!.]*")}
    there = {LOCK, "checkpoints", "samples", pinned.DETAILS}
    return names <= there and steps <= {"step-00000000"}


def still_needed(trainer: Trainer) -> int:
    """The bytes that a run will write in addition to its existing checkpoints."""
    loader = trainer.loader
    one = disk.state_bytes(trainer.state_dict()) + disk.momenta_bytes(trainer.optimizer)
    steps = max(0, trainer.total_steps - trainer.step)
    per_epoch = loader.steps_per_epoch
    epochs = -(-steps // per_epoch)
    keep = kept_checkpoints(trainer.recipe, per_epoch)
    there = disk.used_bytes(trainer.folder.checkpoints)
    return max(0, disk.run_bytes(one, keep=keep, steps=steps, epochs=epochs) - there)


def kept_checkpoints(recipe: Recipe, per_epoch: int) -> int:
    """How many checkpoints a run keeps, including those that may still prove unhealthy."""
    sentinel = recipe.sentinel
    proving = 1 - (-sentinel.late(per_epoch) // per_epoch) if sentinel.on else 0  # ends of epochs
    return recipe.run.keep + proving


def resume_from(trainer: Trainer, folder: RunFolder, found: checkpoint.Sound | None = None) -> None:
    """Load the newest readable checkpoint into a trainer; damaged ones are renamed."""
    if found is None:
        checkpoint.recover(folder.checkpoints)
        found = checkpoint.sound(folder.checkpoints)
    path, state, damaged = found
    try:
        trainer.load_state_dict(state)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except JemkitError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if memory_ran_out(error):
            raise
        raise DataError(
            f"{path} does not fit this run: {type(error).__name__}: {error}; check whether its "
            f"config.json was changed"
        ) from None
    for broken, reason in damaged.items():
        aside = checkpoint.set_aside(broken)
        _tell(
            folder,
            "damaged",
            f"{reason}. Continuing from {path.name}; the damaged one is kept as {aside.name}",
        )
    _check_best(trainer, folder, state)
    folder.mend_logs()
    folder.drop_metrics_from(trainer.step)


def _check_best(trainer: Trainer, folder: RunFolder, state: checkpoint.State) -> None:
    """A missing or damaged best checkpoint is written again, or chosen from later epochs."""
    best = folder.checkpoints / "best"
    if not trainer.best:
        return
    try:
        checkpoint.verify(best)
    except DataError as error:
        if best.exists():
            checkpoint.set_aside(best)
        if trainer.best["epoch"] * trainer.loader.steps_per_epoch == trainer.step:
            checkpoint.save(best, state)
            _tell(folder, "damaged", f"{error}. The best epoch is the newest and is written again")
            return
        if trainer.step == trainer.total_steps:
            raise DataError(f"{error}. The run is complete and its best epoch is lost") from None
        trainer.best = {}
        _tell(folder, "damaged", f"{error}. The best will be chosen from later epochs")


def _tell(folder: RunFolder, kind: str, message: str) -> None:
    log.warning("%s", message)
    folder.event(kind, message=message)
