"""A run in its folder: start or resume, train, evaluate."""

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jemkit.config.recipe import Recipe, Resolved, complete
from jemkit.config.registry import Registry
from jemkit.errors import DataError, JemkitError, memory_ran_out
from jemkit.runtime import checkpoint, disk, distributed
from jemkit.runtime.files import set_aside, write_json
from jemkit.runtime.latest import link_latest
from jemkit.runtime.lock import LOCK, locked
from jemkit.runtime.precision import device_of, slow_precision
from jemkit.runtime.run_dir import RunFolder
from jemkit.training import mixing, pinned, resuming
from jemkit.training.build import leads
from jemkit.training.initial_weights import check_same, doubts, initial
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
    Raises ConfigError or DataError before the first step; Diverged; Preempted once it is saved.
    """
    whole, folder = complete(resolved, registry), RunFolder(out)
    with ExitStack() as held:

        def set_up() -> Trainer:
            goes_on = distributed.on_rank_zero(lambda: _opened(folder, resume, held))
            begin = _resumed if goes_on else _fresh
            trainer, start = begin(whole, folder, registry, init_from, watch)
            trainer.stop = stop or trainer.stop
            state = trainer.state_dict()

            def write() -> None:
                data = None if goes_on else pinned.pin(trainer.splits)
                tight = disk.check_room(out, still_needed(trainer, state), free=free)
                held.enter_context(disk.waiting(patience or disk.Patience(trainer.stop)))
                if data is None:
                    _go_on(trainer, start)
                else:
                    out.mkdir(parents=True, exist_ok=True)
                    _lock(folder, held)
                    _begin(trainer, whole, data, init_from, state)
                    for warning in start["warnings"]:
                        _warn_event(folder, "init_from", warning)
                link_latest(latest or out.parent, out)
                folder.event("resume" if goes_on else "start", step=trainer.step)
                if tight is not None:
                    _warn_event(folder, "disk", tight)
                if slow := slow_precision(whole.recipe.run.precision, trainer.parts.device):
                    _warn_event(folder, "precision", slow)
                trainer.writer.ready(state)
                trainer.tracking.begin(whole.tables, trainer.step, trainer.total_steps)

            distributed.on_rank_zero(write)
            return trainer

        held.enter_context(distributed.group(device_of(whole.recipe.run.device).type))
        trainer = set_up()
        held.enter_context(trainer.tracking)
        trainer.run()
        return trainer.finish()


def _opened(folder: RunFolder, resume: bool, held: ExitStack) -> bool:
    """Whether there is a run to resume, which is locked then."""
    goes_on = resume or (distributed.restarts() > 0 and (folder.path / pinned.CONFIG).exists())
    if goes_on:
        RunFolder.open(folder.path)
        _lock(folder, held)
    else:
        RunFolder.check_links(folder.path)
        _check_vacant(folder)
    return goes_on


def _lock(folder: RunFolder, held: ExitStack) -> None:
    held.enter_context(locked(folder.path / LOCK, f"has trained in {folder.path}"))


def _check_vacant(folder: RunFolder) -> None:
    """Refuse a folder that is not empty, unless a run was killed there before it started."""
    if not unborn(folder.path):
        RunFolder.check_vacant(folder.path)


def _fresh(
    whole: Resolved, folder: RunFolder, _: Registry, init_from: Path | None, watch: Watch | None
) -> tuple[Trainer, dict[str, Any]]:
    """A new run before its first step; nothing is written yet."""
    trainer = Trainer(whole, folder, watch)
    if init_from is None:
        return trainer, {"warnings": []}

    def read() -> dict[str, Any]:
        start = initial(init_from)
        warnings = doubts(start, trainer.recipe, trainer.total_steps)
        return {"weights": start.weights, "warnings": warnings}

    fresh_start = distributed.on_rank_zero(read)
    distributed.prepared(lambda: trainer.parts.begin_with(fresh_start["weights"]))
    return trainer, fresh_start


def _resumed(
    whole: Resolved, folder: RunFolder, registry: Registry, init_from: Path | None,
    watch: Watch | None,
) -> tuple[Trainer, dict[str, Any]]:  # fmt: skip
    """A run in the state of its newest checkpoint, with its recipe and its data."""

    def read() -> dict[str, Any]:
        start = newest_state(folder)
        path = folder.checkpoints / start["name"]
        going = resuming.agreed(whole, folder.path, start["state"], path, registry)
        if init_from is not None:
            check_same(init_from, going["config"])
        return {**start, **going}

    start = distributed.on_rank_zero(read)
    config = folder.path / pinned.CONFIG
    pin = distributed.prepared(lambda: pinned.read(config) if leads() else None)
    trainer = Trainer(whole, folder, watch, pinned=pin)
    # rejected now, not at the final evaluation
    distributed.on_rank_zero(lambda: bool(trainer.splits.images("test")))
    distributed.on_rank_zero(lambda: mixing.check_same(trainer.loader, start["config"]))
    resume_from(trainer, folder, start)
    trainer.config = {name: start["config"][name] for name in STORED if name in start["config"]}
    return trainer, start


def _go_on(trainer: Trainer, start: dict[str, Any]) -> None:
    """Store the recipe with which a run resumes, if it changed."""
    before, now = start["epochs"], trainer.recipe.run.epochs
    if now > before:
        message = (
            f"the run was started with {before} epochs and continues to {now}. From here on its "
            f"learning rate follows the schedule of {now} epochs, so it is not bit-for-bit "
            f"identical to a run of {now} epochs from the start"
        )
        _warn_event(trainer.folder, "extended", message)
    if start["changed"]:
        write_json(trainer.folder.path / pinned.CONFIG, start["config"])


STORED = ("recipe", "data")
"""The part of config.json that a checkpoint stores, so that a change is detected."""


def _begin(
    trainer: Trainer,
    whole: Resolved,
    data: tuple[pinned.Table, pinned.Details],
    init_from: Path | None,
    state: checkpoint.State,
) -> None:
    """Make the folder a run: config.json is written last, when there is a checkpoint."""
    folder = trainer.folder
    _check_vacant(folder)  # another process may have been faster
    for part in (folder.checkpoints, folder.samples):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    for litter in (p for name in WRITTEN for p in folder.path.glob(f".{name}.*")):
        litter.unlink()
    table = pinned.write(folder.path, *data)
    trainer.config = {"recipe": whole.tables, "data": table}
    state = {**state, "config": trainer.config}
    checkpoint.save(folder.checkpoints / f"step-{trainer.step:08d}", state)
    also: dict[str, Any] = {"data": table, **mixing.record(trainer.loader)}
    if init_from is not None:
        also["init_from"] = {"given": str(init_from), "path": str(init_from.resolve())}
    folder.write_config(whole.tables, whole.origins, **also)


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


def still_needed(trainer: Trainer, state: checkpoint.State) -> int:
    """The bytes that a run will write in addition to its existing checkpoints."""
    one = disk.state_bytes(state) + disk.momenta_bytes(trainer.optimizer)
    steps, per_epoch = trainer.total_steps - trainer.step, trainer.loader.steps_per_epoch
    keep, epochs = checkpoint_count(trainer.recipe, per_epoch), -(-steps // per_epoch)
    there = disk.used_bytes(trainer.folder.checkpoints)
    return max(0, disk.run_bytes(one, keep=keep, steps=steps, epochs=epochs) - there)


def checkpoint_count(recipe: Recipe, per_epoch: int) -> int:
    """How many checkpoints a run keeps, including those that may still prove unhealthy."""
    sentinel = recipe.sentinel
    proving = 1 - (-sentinel.late(per_epoch) // per_epoch) if sentinel.on else 0  # ends of epochs
    return recipe.run.keep + proving


def newest_state(folder: RunFolder) -> dict[str, Any]:
    """The newest readable checkpoint, and why newer ones cannot be read."""
    checkpoint.recover(folder.checkpoints)
    path, state, damaged = checkpoint.sound(folder.checkpoints)
    reasons = {newer.name: str(error) for newer, error in damaged.items()}
    return {"name": path.name, "state": state, "damaged": reasons}


def _load(trainer: Trainer, state: checkpoint.State, path: Path) -> None:
    """Load a state into a trainer; a DataError that names the checkpoint where it does not fit."""
    try:
        trainer.load_state_dict(state)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except JemkitError:
        raise
    except (
        LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError,
    ) as error:  # fmt: skip
        if memory_ran_out(error):
            raise
        what = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{path} does not fit this run: {what}; check whether its config.json was changed"
        ) from None


def resume_from(trainer: Trainer, folder: RunFolder, start: dict[str, Any] | None = None) -> None:
    """Load the newest readable checkpoint into a trainer; damaged ones are renamed."""
    if start is None:
        start = distributed.on_rank_zero(lambda: newest_state(folder))
    path, state, damaged = folder.checkpoints / start["name"], start["state"], start["damaged"]
    distributed.prepared(lambda: _load(trainer, state, path))

    def mend() -> dict[str, Any]:
        for name, reason in damaged.items():
            aside = set_aside(folder.checkpoints / name)
            note = f"the damaged one is kept as {aside.name}"
            _warn_event(folder, "damaged", f"{reason}. Continuing from {path.name}; {note}")
        _check_best(trainer, folder, state)
        folder.mend_logs()
        folder.drop_metrics_from(trainer.step)
        return trainer.best

    trainer.best = distributed.on_rank_zero(mend)


def _check_best(trainer: Trainer, folder: RunFolder, state: checkpoint.State) -> None:
    """A missing or damaged best checkpoint is written again, or chosen from later epochs."""
    best = folder.checkpoints / "best"
    if not trainer.best:
        return None
    try:
        checkpoint.verify(best)
    except DataError as error:
        if best.exists():
            set_aside(best)
        if trainer.best["epoch"] * trainer.loader.steps_per_epoch == trainer.step:
            checkpoint.save(best, state)
            now = "The best epoch is the newest and is written again"
            return _warn_event(folder, "damaged", f"{error}. {now}")
        if trainer.step == trainer.total_steps:
            raise DataError(f"{error}. The run is complete and its best epoch is lost") from None
        trainer.best = {}
        _warn_event(folder, "damaged", f"{error}. The best will be chosen from later epochs")


def _warn_event(folder: RunFolder, kind: str, message: str) -> None:
    log.warning("%s", message)
    folder.event(kind, message=message)
