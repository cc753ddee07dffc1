"""Training: the loop over the steps of a run."""

import re
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
from jemkit.runtime.divergence_monitor import Finding, Unhealthy
from jemkit.runtime.precision import judging, numerics
from jemkit.runtime.preemption import PreemptionCheck
from jemkit.runtime.run_dir import RunFolder
from jemkit.splits import Pinned
from jemkit.step import seeded_step
from jemkit.training.build import build_run, load_model
from jemkit.training.compatibility import trained_threat
from jemkit.training.metrics_log import GATHER, PATIENCE, Journal
from jemkit.training.opened import read_checkpoint
from jemkit.training.restore import about_parts
from jemkit.training.rollback import RollbackPolicy, diagnosis
from jemkit.training.saved_state import Expected
from jemkit.training.saved_state import check as check_saved
from jemkit.training.tracking import Tracking
from jemkit.training.validation import Validator, images_to_judge, is_better
from jemkit.updaters import Guard

REDRAW = 10.0
"""Seconds between two updates of curves.svg, which take longer than a short epoch."""


class Summary(NamedTuple):
    """How a run ended."""

    run: Path
    epochs: int
    best_epoch: int
    select: str  # the validation accuracy that selected it, `run.select`
    seconds: float
    figures: list[Figure]

    def value(self, name: str) -> float:
        """A figure's value by its name."""
        return next(figure.value for figure in self.figures if figure.name == name)


Watch = Callable[[str, dict[str, Any]], None]
"""Called with what to show at "start", "step", "epoch", "rollback", "compiled" and "end"."""


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
        self.tracking = Tracking(self.recipe.trackers, folder)
        self.parts = parts = build_run(self.recipe, pinned)
        self.task, self.splits, self.rng = parts.task, parts.splits, parts.rng
        self.backbone, self.objective, self.loader = parts.backbone, parts.objective, parts.loader
        self.optimizer, self.updater, self.ema = parts.optimizer, parts.updater, parts.ema
        self.rollback = RollbackPolicy(self.recipe.sentinel, parts, self.recipe.run.seed)
        self.guard, self.writer = Guard(), checkpoint.Writer()
        self.journal = Journal(folder, self.tracking)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self._redrawn = 0.0
        run = self.recipe.run
        self._settings: Any = {"deterministic": run.deterministic, "threads": run.threads}
        # several processes stop between steps alone; a compiled graph has no place for a check
        self._stops_inside = distributed.shard().size == 1 and not run.compile

    @property
    def step(self) -> int:
        return self.loader.step

    @property
    def seconds(self) -> float:
        """Of all steps whose metrics were read."""
        return self.journal.seconds

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole recipe."""
        return self.task.total_steps

    def run(self, until: int | None = None) -> None:
        """Train to the end of the recipe, or until `until` steps are done; then save."""
        run, total = self.recipe.run, self.total_steps
        last = min(total if until is None else until, total)
        self.watch("start", {"step": self.step, "total": self.total_steps, "epochs": run.epochs})
        self.backbone.model.train()
        if self.recipe.sentinel.on and self.step == 0:
            self.save()  # the checkpoint to roll back to before the end of the first epoch
        passes = self.polling.passes(self.backbone.model, on=self._stops_inside)
        with numerics(precision=run.precision, **self._settings), passes:
            try:
                self._recovering(last)
            finally:
                self.writer.wait()

    def _recovering(self, last: int) -> None:
        while True:
            try:
                return self._steps(last)
            except Preempted:
                self._save_at_end()
                message = f"stopped at step {self.step}; continue with --resume"
                distributed.on_rank_zero(partial(self._end, message))
            except Diverged as error:
                self._roll_back(error)
            except OutOfMemory as error:
                self._out_of_memory(error)

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
        momentum = self.recipe.schedule.momentum(step, self.total_steps)
        self.polling.begin()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * factor
            if momentum is not None and "momentum" in group:
                group["momentum"] = momentum
        before, stream = self.loader.state_dict(), self.rollback.stream("network", step)
        try:
            with distributed.together():
                batch = self.loader.batch()
                take = partial(
                    seeded_step, stream, self.backbone, self.objective, self.updater, batch,
                    self.rng, self.guard, run.theta_steps,
                )  # fmt: skip
                log = partial(self.folder.event, "memory", step=step)
                terms = self.parts.micro.retry_on_oom(
                    take, moved=lambda: self.guard.updates, on_change=log
                )
        except BaseException:
            self.loader.load_state_dict(before)
            self.journal.stopwatch.drop()
            raise
        if self.ema is not None:
            self.ema.update(self.backbone.model, self._ema_updates(step))
        known = {
            "step": step,
            "epoch": step // self.loader.steps_per_epoch + 1,
            "lr": self.recipe.optimizer.lr * factor,
        }
        self.journal.note(known, self.loader.batch_size, terms, self.guard)
        if self.step % GATHER == 0:
            self._report()

    def _ema_updates(self, step: int) -> int | None:
        """The EMA's updates since it stopped being a copy; None where its decay is constant."""
        run = self.recipe.run
        return step - round(run.ema_copy * self.total_steps) if run.ema_warmup else None

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
        if better := is_better(score, self.best.get("score"), self.recipe.run.select):
            self.best = {"epoch": epoch, "score": score}
        self.save(replace=True, best=better)
        distributed.on_rank_zero(lambda: self._log_epoch(entry))
        self.watch("epoch", entry)

    def _validate(self, epoch: int) -> tuple[dict[str, float], dict[str, float], tuple[int, bool]]:
        """What validation finds, the sizes that the sentinel follows, and the micro-batch."""
        polls = not self._stops_inside  # otherwise `run` checks in every pass
        run = self.recipe.run
        strict = judging(self.parts.device, **self._settings)
        with self.polling.passes(self.backbone.model, on=polls), strict:
            sizes = self.rollback.monitor.body(self.step, self.ema.average if self.ema else {})
            validator = self.validator(epoch)
            average = nullcontext() if self.ema is None else self.ema.applied(self.backbone.model)
            with average, self.rollback.monitor.outputs(self.step):
                metrics = validator.validate(run.eval_images)
            validator.draw_grid(self.folder.samples / f"epoch-{epoch:04d}.png")
        return metrics, sizes, (self.parts.micro.size, self.parts.micro.recompute)

    def _log_epoch(self, entry: dict[str, Any]) -> None:
        self.tracking.epoch(entry)
        if self.step == self.total_steps or time.monotonic() > self._redrawn + REDRAW:
            curves.save(self.folder.path)
            self._redrawn = time.monotonic()

    def validator(self, epoch: int) -> Validator:
        """How the model is validated after an epoch; 0 for the end."""
        seed, micro = self.recipe.run.seed, self.parts.micro
        trained = trained_threat(self.recipe.objective, self.task.radius_px)
        return Validator(self.backbone, self.task, self.splits, seed, epoch, micro, trained)

    def finish(self) -> Summary:
        """Evaluate the weights of the best epoch on the test split, at full size."""
        with self.parts.whole_model():
            figures = distributed.on_rank_zero(self._judge)
        best, run = self.best["epoch"], self.recipe.run
        reloaded = [Figure(**figure) for figure in figures]
        summary = Summary(self.folder.path, run.epochs, best, run.select, self.seconds, reloaded)
        self.watch("end", {"summary": summary})
        return summary

    def _judge(self) -> list[dict[str, Any]]:
        """The figures of the best epoch, once its record is written."""
        folder, run, path = self.folder, self.recipe.run, self.folder.checkpoints / "best"
        opened = read_checkpoint(folder.path.resolve(), path)
        about = opened.about | about_parts(self.tables, self.recipe, self.task.radius_px)
        count = images_to_judge(self.parts, run.test_images)
        self.polling.begin()
        with judging(self.parts.device, **self._settings):
            load_model(self.backbone.model, opened.weights)
            try:
                with self.polling.passes(self.backbone.model, on=True):
                    record = self.validator(0).judge(about, count)
                    self.validator(0).draw_energies(folder.path / "energies.svg")
            except Preempted:  # everything trained is saved
                self._end("stopped during the final evaluation; continue with --resume")
        records.save(folder.path, record, Notes())
        return self.tracking.evaluation(self.step, record.figures)

    def _end(self, message: str) -> NoReturn:
        self.folder.event("preempted", step=self.step)
        raise Preempted(message)

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
        check_saved(state, Expected(
            self.backbone.model.state_dict(), self.ema is not None, self.parts.rng.get_state(),
            self.optimizer, self.loader, self.total_steps, self.recipe.sentinel.tries,
        ))  # fmt: skip
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

    def _save_at_end(self) -> None:
        try:
            self.save()
            distributed.on_rank_zero(self.writer.wait)  # before any process ends
        except Diverged as error:  # of its last steps; the checkpoint to roll back to is saved
            self._roll_back(error)

    def _out_of_memory(self, error: OutOfMemory) -> NoReturn:
        """End a run that ran out of memory, once its state is saved."""
        message = str(error)
        if error.undone:
            self._save_at_end()
            message += f". Step {self.step} is saved; --resume continues from it with more memory"

        def end() -> NoReturn:
            if distributed.shard().rank == 0:
                self.folder.event("memory", step=self.step, ended=message)
            raise OutOfMemory(message, undone=error.undone) from None

        if error.undone:
            distributed.on_rank_zero(end)
        end()

    def _roll_back(self, error: Diverged) -> None:
        """Roll back to a healthy checkpoint, or raise Diverged.

        The rolled-back state is saved in place of that checkpoint, and later checkpoints are
        deleted; the best epoch is kept, whichever attempt it is from.
        """
        distributed.on_rank_zero(self.writer.wait)
        policy, folder, step = self.rollback, self.folder.checkpoints, self.step
        finding = self._earliest(error)
        newest = distributed.on_rank_zero(lambda: policy.newest_proven(folder, finding.since))
        name, state = newest
        cause = policy.obstacle
        if state is None or cause or not policy.may_try:
            distributed.on_rank_zero(lambda: self._give_up(finding, name, cause))
        tried, best, seconds = policy.tried, self.best, self.seconds
        self.load_state_dict(state)
        self.best, self.journal.seconds, self.guard = best, seconds, Guard()
        policy.apply_remedies(tried)
        entry = policy.try_next(finding, step, self.step)
        rolled_back = self.state_dict()

        def put_back() -> None:
            for path in reversed(checkpoint.complete(folder)):
                if path.name > name:  # newest first: a run killed here repeats the rollback
                    checkpoint.remove(path)
            checkpoint.save(folder / name, rolled_back)
            self.folder.drop_metrics_from(self.step)
            self.tracking.rollback(entry, self.step)

        distributed.on_rank_zero(put_back)
        self.watch("rollback", entry)

    def _give_up(self, finding: Finding, name: str, cause: str | None) -> NoReturn:
        folder, policy = self.folder.checkpoints, self.rollback
        where = folder / name if name else None
        where = checkpoint.newest(folder) if cause else where
        what = {"reason": finding.message, "tried": policy.tried}
        self.folder.event("diverged", step=self.step, **what)
        rate = self.recipe.optimizer.lr
        raise Diverged(diagnosis(finding, self.step, policy, rate, where, cause))

    def _earliest(self, error: Diverged) -> Finding:
        """A finding in metrics that were not read yet takes precedence over the error."""
        try:
            self.gather()
        except Unhealthy as earlier:
            return earlier.finding
        if isinstance(error, Unhealthy):
            return error.finding
        message = re.sub(r"^update \d+: ", "", str(error))  # counted again in every process
        return Finding("update", self.step, message)
