"""A run from its folder: begin or go on, train, judge."""

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from jemkit import checkpoint
from jemkit.errors import DataError, JemkitError, memory_ran_out
from jemkit.follower import follow
from jemkit.recipe import Resolved, complete, with_run
from jemkit.registry import Registry
from jemkit.runtime import disk, distributed
from jemkit.runtime.files import drop_torn_line
from jemkit.runtime.folder import RunFolder
from jemkit.runtime.lock import LOCK, locked
from jemkit.runtime.numerics import device_of
from jemkit.team import begin_with, leading, losses_told
from jemkit.training import Summary, Trainer, Watch

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
    """Train a recipe into the folder `out` and judge its best epoch on the test split.

    A link `latest` in the folder of that name, else beside the run, points to it. Where the disk
    is full, writing waits for room (`patience`). Raises ConfigError or DataError before the first
    step, Diverged, or Preempted once it is saved.
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
            whole = _as_measured(whole, RunFolder(out))
        elif not unborn(out):
            RunFolder.check_vacant(out)
        trainer = Trainer(whole, RunFolder(out), watch)  # before anything is written
        if stop is not None:
            trainer.stop = stop
        if resume:
            resume_from(trainer, trainer.folder)
        elif init_from is not None:
            weights = checkpoint.load_weights(init_from)
            begin_with(trainer.parts, weights)
        tight = disk.check_room(out, still_needed(trainer), free=free)
        held.enter_context(disk.waiting(patience or disk.Patience(trainer.stop)))
        if not resume:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out / LOCK, doing))
            _begin(trainer, whole)
        if trainer.measured:
            trainer.folder.event("layout", channels_last=trainer.measured)
        trainer.folder.link_latest(latest or out.parent)
        trainer.folder.event("resume" if resume else "start", step=trainer.step)
        if tight is not None:
            _tell(trainer.folder, "disk", tight)
        trainer.writer.ready(trainer.state_dict())
        trainer.run()
        return trainer.finish()


def _begin(trainer: Trainer, whole: Resolved) -> None:
    """Make the folder a run: config.json is written last, when there is a step to resume from."""
    folder = trainer.folder
    if not unborn(folder.path):  # another process was faster
        RunFolder.check_vacant(folder.path)
    for part in (folder.checkpoints, folder.samples):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    for litter in folder.path.glob(".config.json.*"):
        litter.unlink()
    checkpoint.save(folder.checkpoints / f"step-{trainer.step:08d}", trainer.state_dict())
    tables, origins = whole.tables, whole.origins
    if trainer.recipe.run.channels_last == "measure":  # who reads the run lays it out as it was
        tables = {**tables, "run": {**tables["run"], "channels_last": trainer.parts.channels_last}}
    if trainer.measured:
        origins = {**origins, "run.channels_last": "measured"}
    folder.write_config(tables, origins)


def _as_measured(whole: Resolved, folder: RunFolder) -> Resolved:
    """The recipe that a run was begun with, by the layout that was measured then."""
    if whole.recipe.run.channels_last != "measure":
        return whole
    return with_run(whole, channels_last=folder.config["recipe"]["run"]["channels_last"])


def unborn(out: Path) -> bool:
    """Whether a folder is what a kill left of a run that had not begun."""
    if not (out / LOCK).is_file():
        return False
    names = {p.name for p in out.iterdir() if not p.name.startswith(".config.json.")}
    steps = {p.name for p in (out / "checkpoints").glob("[!.]*")}
    return names <= {LOCK, "checkpoints", "samples"} and steps <= {"step-00000000"}


def still_needed(trainer: Trainer) -> int:
    """The bytes that a run is going to take beside those of its checkpoints that are there."""
    run, loader = trainer.recipe.run, trainer.loader
    one = disk.state_bytes(trainer.state_dict()) + disk.momenta_bytes(trainer.optimizer)
    steps = max(0, trainer.total_steps - trainer.step)
    sentinel, per_epoch = trainer.recipe.sentinel, loader.steps_per_epoch
    epochs = -(-steps // per_epoch)
    proving = 1 - (-sentinel.late(per_epoch) // per_epoch) if sentinel.on else 0  # ends of epochs
    keep = run.keep + proving
    there = disk.used_bytes(trainer.folder.checkpoints)
    return max(0, disk.run_bytes(one, keep=keep, steps=steps, epochs=epochs) - there)


def resume_from(trainer: Trainer, folder: RunFolder) -> None:
    """Put a trainer where the newest checkpoint that can be read stands; damaged ones are kept."""
    checkpoint.recover(folder.checkpoints)
    path, state, damaged = checkpoint.sound(folder.checkpoints)
    try:
        trainer.load_state_dict(state)
    except JemkitError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if memory_ran_out(error):
            raise
        raise DataError(
            f"{path} does not fit this run: {type(error).__name__}: {error}; was its config.json "
            "changed?"
        ) from None
    for broken, reason in damaged.items():
        aside = checkpoint.set_aside(broken)
        _tell(folder, "damaged", f"{reason}. Going on from {path.name}; {aside.name} keeps it")
    _check_best(trainer, folder, state)
    for log_file in ("metrics.csv", "events.jsonl"):
        drop_torn_line(folder.path / log_file)
    folder.drop_metrics_from(trainer.step)


def _check_best(trainer: Trainer, folder: RunFolder, state: checkpoint.State) -> None:
    """A best checkpoint that is gone or damaged: written again, else the best is yet to come."""
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
            _tell(folder, "damaged", f"{error}. The best epoch is the newest: it is written again")
            return
        if trainer.step == trainer.total_steps:
            raise DataError(f"{error}. The run is complete and its best epoch is lost") from None
        trainer.best = {}
        _tell(folder, "damaged", f"{error}. The best is chosen from the epochs to come")


def _tell(folder: RunFolder, kind: str, message: str) -> None:
    log.warning("%s", message)
    folder.event(kind, message=message)
