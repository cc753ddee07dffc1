"""Training: the loop over the steps of a run."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jemkit.config.recipe import Recipe, Resolved
from jemkit.errors import Diverged, OutOfMemory, Preempted
from jemkit.metrics import curves
from jemkit.metrics import record as records
from jemkit.metrics.evaluator import Notes
from jemkit.metrics.figures import Figure
from jemkit.runtime import checkpoint, distributed
from jemkit.runtime.precision import judging, numerics
from jemkit.runtime.preemption import PreemptionCheck
from jemkit.runtime.run_dir import RunFolder
from jemkit.splits import Pinned
from jemkit.step import train_step
from jemkit.training.build import build_run, load_model
from jemkit.training.compatibility import trained_threat
from jemkit.training.metrics_log import GATHER, PATIENCE, Journal
from jemkit.training.opened import about_checkpoint
from jemkit.training.restore import about_parts
from jemkit.training.rollback import RollbackPolicy, roll_back, saved
from jemkit.training.saved_state import check as check_saved
from jemkit.training.saved_state import weights_of
from jemkit.training.validation import Validator
from jemkit.updaters import Guard

__all__ = [
    "Summary", "Trainer", "Watch", "train_step",
]  # fmt: skip


REDRAW = 10.0
"""Seconds between two updates of curves.svg, which take longer than a short epoch."""


class Summary(NamedTuple):
    """How a run ended."""

    run: Path
    epochs: int
    best_epoch: int
    seconds: float
    figures: list[Figure]

    def value(self, name: str) -> float:
        """A figure's value by its name."""
        return next(figure.value for figure in self.figures if figure.name == name)


Watch = Callable[[str, dict[str, Any]], None]
"""Called at a run's "start", "step", "epoch", "rollback", "compiled" and "end", with what to
show."""


class Trainer:
    """A run: everything that a recipe determines, and the loop over its steps."""

    def __init__(
        self,
        resolved: Resolved,
        folder: RunFolder,
        watch: Watch | None = None,
        *,
        pinned: Pinned | None = None,
    ) -> None:
        self.recipe: Recipe = resolved.recipe
        self.tables = resolved.tables
        self.config: dict[str, Any] | None = None  # the part of config.json that checkpoints store
        self.folder = folder  # written on rank 0 alone
        shown = watch if distributed.shard().rank == 0 else None
        self.watch: Watch = shown or (lambda kind, what: None)
        self.stop: Callable[[], bool] = lambda: False  # called between steps, and inside long ones
        self.polling = PreemptionCheck(lambda: self.stop(), lambda: self.guard.updates)
        self.parts = parts = build_run(self.recipe, pinned)
        self.task, self.splits, self.rng = parts.task, parts.splits, parts.rng
        self.backbone, self.objective, self.loader = parts.backbone, parts.objective, parts.loader
        self.optimizer, self.updater, self.ema = parts.optimizer, parts.updater, parts.ema
        self.rollback = RollbackPolicy(self.recipe.sentinel, parts, self.recipe.run.seed)
        self.guard, self.writer = Guard(), checkpoint.Writer()
        self.journal = Journal(folder, tensorboard=self.recipe.run.tensorboard)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self._redrawn = 0.0
        # several processes stop between steps alone; a compiled graph has no place for a check
        single_process = distributed.shard().size == 1
        self._stops_inside = single_process and not self.recipe.run.compile

    @property
    def step(self) -> int:
        """Steps done."""
        return self.loader.step

    @property
    def seconds(self) -> float:
        """Of all steps whose metrics were read."""
        return self.journal.seconds

    @property
    def total_steps(self) -> int:
        return self.task.total_steps

    def run(self, until: int | None = None) -> None:
        """Train to the end of the recipe, or until `until` steps are done; then save."""
        run, last = self.recipe.run, min(until or self.total_steps, self.total_steps)
        begun: dict[str, Any] = {"step": self.step, "total": self.total_steps, "epochs": run.epochs}
        self.watch("start", begun)
        self.backbone.model.train()
        if self.recipe.sentinel.on and self.step == 0:
            self.save()  # the checkpoint to roll back to before the end of the first epoch
        passes = self.polling.passes(self.backbone.model, on=self._stops_inside)
        switches = partial(numerics, deterministic=run.deterministic, threads=run.threads)
        with switches(precision=run.precision), passes:
            try:
                self._recovering(last)
            finally:
                self.writer.wait()

    def _recovering(self, last: int) -> None:
        while True:
            try:
                return self._steps(last)
            except Preempted:
                self._preempted()
            except Diverged as error:
                roll_back(self, error)
            except OutOfMemory as error:
                saved(self, error)

    def _steps(self, last: int) -> None:
        per_epoch = self.loader.steps_per_epoch
        if self.step % per_epoch == 0 and len(self.history) < self.step // per_epoch:
            self.end_epoch()  # a stop was requested meanwhile
        while self.step < last:
            self._between_steps()
            self.one_step()
            if self.step % per_epoch == 0:
                self.end_epoch()
        self.save()
        distributed.on_rank_zero(self.writer.wait)

    def _between_steps(self) -> None:
        """What depends on a clock or a signal; all processes decide the same."""
        due, stop = distributed.total(self.journal.age > PATIENCE, self.stop())
        if due:
            self._report()
        if stop:
            raise Preempted

    def _report(self) -> None:
        if newest := self.gather():
            self.watch("step", {**newest, "step": self.step})

    def one_step(self) -> None:
        """Set the learning rate, draw, update, log."""
        step, run = self.step, self.recipe.run
        self.journal.stopwatch.begin()
        factor = self.recipe.schedule.factor(step, self.total_steps) * self.rollback.rate
        self.polling.begin()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * factor
        before = self.loader.state_dict()
        try:
            with distributed.together():
                batch = self.loader.batch()
                take = partial(
                    train_step, self.backbone, self.objective, self.updater, batch, self.rng,
                    self.guard, run.theta_steps,
                )  # fmt: skip
                log = partial(self.folder.event, "memory", step=step)
                terms = self.parts.micro.fit(take, moved=lambda: self.guard.updates, on_change=log)
        except BaseException:
            self.loader.load_state_dict(before)
            self.journal.stopwatch.drop()
            raise
        if self.ema is not None:
            self.ema.update(self.backbone.model, step if run.ema_warmup else None)
        known = {
            "step": step,
            "epoch": step // self.loader.steps_per_epoch + 1,
            "lr": self.recipe.optimizer.lr * factor,
        }
        self.journal.note(known, self.loader.batch_size, terms, self.guard)
        if self.step % GATHER == 0:
            self._report()

    def end_epoch(self) -> None:
        """Validate, draw a sample grid, update the best epoch, save."""
        self.polling.begin()
        self.guard.settle()
        self._report()
        epoch = self.step // self.loader.steps_per_epoch
        with self.parts.whole_model():
            metrics, sizes, micro = distributed.on_rank_zero(lambda: self._validate(epoch))
        # An OOM in validation halves the micro-batch of rank 0; the others follow.
        self.parts.micro.size, self.parts.micro.recompute = micro
        accuracies = [entry["accuracy"] for entry in [*self.history, metrics]]
        # no pass follows in which a stop could be handled
        self.rollback.monitor.epoch(self.step, sizes, accuracies)
        entry = {"epoch": epoch, "step": self.step, **metrics, "seconds": round(self.seconds, 3)}
        self.history.append(entry)
        score = [metrics["pgd10"], metrics["accuracy"], epoch]
        if better := not self.best or score > self.best["score"]:
            self.best = {"epoch": epoch, "score": score}
        self.save(replace=True, best=better)
        distributed.on_rank_zero(lambda: self._log_epoch(entry))
        self.watch("epoch", entry)

    def _validate(self, epoch: int) -> tuple[dict[str, float], dict[str, float], tuple[int, bool]]:
        """What validation finds, the sizes that the sentinel follows, and the micro-batch."""
        polls = not self._stops_inside  # otherwise `run` checks in every pass
        run = self.recipe.run
        strict = judging(self.parts.device, deterministic=run.deterministic, threads=run.threads)
        with self.polling.passes(self.backbone.model, on=polls), strict:
            sizes = self.rollback.monitor.body(self.step, self.ema.average if self.ema else {})
            validator = self.validator(epoch)
            with nullcontext() if self.ema is None else self.ema.applied(self.backbone.model):
                metrics = validator.validate(run.eval_images)
            validator.draw_grid(self.folder.samples / f"epoch-{epoch:04d}.png")
        return metrics, sizes, (self.parts.micro.size, self.parts.micro.recompute)

    def _log_epoch(self, entry: dict[str, Any]) -> None:
        self.folder.event("epoch", **entry)
        if self.step == self.total_steps or time.monotonic() > self._redrawn + REDRAW:
            curves.save(self.folder.path)
            self._redrawn = time.monotonic()

    def validator(self, epoch: int) -> Validator:
        """How the model is validated after an epoch; 0 for the end."""
        seed, micro = self.recipe.run.seed, self.parts.micro
        trained = trained_threat(self.recipe.objective, self.task.radius_px)
        return Validator(self.backbone, self.task, self.splits, seed, epoch, micro, trained)

    def finish(self) -> Summary:
        """Evaluate the best epoch on the test split, at full size."""
        return judged(self)

    def save(self, *, replace: bool = False, best: bool = False) -> None:
        """Write a checkpoint of this step in the background; `replace` overwrites one."""
        self.guard.settle()
        self.gather()
        folder, step, keep = self.folder.checkpoints, self.step, self.recipe.run.keep
        path = folder / f"step-{step:08d}"
        if distributed.on_rank_zero(lambda: self._written(path)) and not replace:
            return
        state = self.state_dict()
        if distributed.shard().rank == 0:
            prune = partial(self.rollback.prune, folder, step, keep)
            self.writer.save(path, state, best=folder / "best" if best else None, then=prune)

    def _written(self, path: Path) -> bool:
        """Whether a checkpoint is there, once the one under way is written."""
        self.writer.wait()
        return (path / checkpoint.MANIFEST).exists()

    def state_dict(self) -> dict[str, Any]:
        """The complete state of the run, on rank 0; every process calls it."""
        history = {"history": self.history, "best": self.best, "seconds": self.seconds}
        config = {} if self.config is None else {"config": self.config}
        return {**self.parts.state_dict(), **history, "care": self.rollback.state_dict(), **config}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state; DataError if no run of this recipe saved it."""
        check_saved(state, self)
        self.parts.load_state_dict(state)
        self.history, self.best = list(state["history"]), dict(state["best"])
        self.journal.seconds = state["seconds"]
        if "care" in state:  # missing in runs from before the sentinel
            self.rollback.load_state_dict(state["care"])

    def gather(self) -> dict[str, Any]:
        """Write the metrics that are due, which the sentinel reads; the newest row."""
        rows = self.journal.gather()
        self.rollback.monitor.rows(rows)
        if compiled := self.parts.compiled:
            distributed.on_rank_zero(lambda: compiled.report(self.folder, self.watch))
        return rows[-1] if rows else {}

    def _preempted(self) -> NoReturn:
        try:
            self.save()
            distributed.on_rank_zero(self.writer.wait)  # before any process ends
        except Diverged as error:  # of its last steps; the checkpoint to roll back to is saved
            roll_back(self, error)
        message = f"stopped at step {self.step}; continue with --resume"
        distributed.on_rank_zero(lambda: preempted(self, message))


FEWEST = 1000
"""Minimum number of test images in the final evaluation, if there are as many."""

PER_IMAGE = 44
"""Forward-pass equivalents per image of the final evaluation: clean accuracy, PGD-20 and the
energies."""


def images_to_judge(trainer: "Trainer") -> int:
    """`run.test_images`, or as many as take a tenth of the passes of training.

    Forward and backward passes of the updates and the chains are counted, so that the number
    depends on the recipe alone and not on a clock.
    """
    requested = trainer.recipe.run.test_images
    if requested is not None:
        return requested
    density = trainer.backbone.density_or_none
    steps = density.steps if density else 0
    passes = trainer.total_steps * trainer.loader.batch_size * (2 + 2 * steps)
    return max(FEWEST, passes // (10 * PER_IMAGE))


def preempted(trainer: "Trainer", message: str) -> NoReturn:
    trainer.folder.event("preempted", step=trainer.step)
    raise Preempted(message)


def judged(trainer: "Trainer") -> Summary:
    """Load the best epoch's weights and evaluate them at full size."""
    with trainer.parts.whole_model():
        figures = distributed.on_rank_zero(lambda: _judged(trainer))
    reloaded = [Figure(**figure) for figure in figures]
    best, epochs = trainer.best["epoch"], trainer.recipe.run.epochs
    summary = Summary(trainer.folder.path, epochs, best, trainer.seconds, reloaded)
    trainer.watch("end", {"summary": summary})
    return summary


def _judged(trainer: "Trainer") -> list[dict[str, Any]]:
    """The figures of the best epoch, once its record is written."""
    folder, run = trainer.folder, trainer.recipe.run
    path = folder.checkpoints / "best"
    state = checkpoint.load(path)
    about = about_checkpoint(folder.path.resolve(), path, averaged=bool(state["ema"]))
    about |= about_parts(trainer.tables, trainer.recipe, trainer.task.radius_px)
    trainer.polling.begin()
    with judging(trainer.parts.device, deterministic=run.deterministic, threads=run.threads):
        load_model(trainer.backbone.model, weights_of(state, path)[0])
        try:
            with trainer.polling.passes(trainer.backbone.model, on=True):
                record = trainer.validator(0).judge(about, images_to_judge(trainer))
                trainer.validator(0).draw_energies(folder.path / "energies.svg")
        except Preempted:  # everything trained is saved
            preempted(trainer, "stopped during the final evaluation; continue with --resume")
    records.save(folder.path, record, Notes())
    figures = [figure._asdict() for figure in record.figures]
    folder.event("end", figures=figures)
    return figures
