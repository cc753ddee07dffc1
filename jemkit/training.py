"""Training: one step of any objective on any backbone, and the flat loop around it."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch import Generator

from jemkit import checkpoint
from jemkit.assembly import check, load_model, put_together
from jemkit.backbone import Backbone
from jemkit.errors import Diverged, Preempted
from jemkit.exam import Exam
from jemkit.figures import Figure
from jemkit.objective import Batch, Objective, Remembering, Terms
from jemkit.pictures import save_curves
from jemkit.recipe import Recipe, Resolved
from jemkit.runtime.folder import RunFolder
from jemkit.runtime.journal import GATHER, PATIENCE, Journal
from jemkit.runtime.numerics import Precision, numerics
from jemkit.update import Guard, Updater

__all__ = ["Summary", "Trainer", "check", "train_step"]

Watch = Callable[[str, dict[str, Any]], None]
"""Told of "start", "step", "epoch" and "end", with what there is to show."""

REDRAW = 10.0
"""Seconds between two drawings of curves.png, which takes longer than a short epoch."""


def train_step(
    backbone: Backbone,
    objective: Objective[Any],
    updater: Updater,
    batch: Batch,
    rng: Generator,
    guard: Guard,
    theta_steps: int = 1,
) -> Terms:
    """Draw once, then move the weights `theta_steps` times (M_theta) on what was drawn.

    A step is a transaction: where it fails, buffer, generator and batch norm are as before it. Of
    several updates those before the failing one stay.
    """
    before = rng.get_state()
    statistics = [(buffer, buffer.clone()) for buffer in backbone.model.buffers()]
    if backbone.has_density:
        backbone.density.mark()
    seen: list[Terms] = []
    try:
        draws = objective.draw(backbone, batch, rng)

        def terms() -> Terms:
            seen.append(objective.loss(backbone, batch, draws))
            return seen[-1]

        for _ in range(theta_steps):
            updater.step(terms, guard)
    except BaseException:
        if backbone.has_density:
            backbone.density.rollback()
        rng.set_state(before)
        for buffer, old in statistics:
            buffer.copy_(old)
        raise
    if isinstance(objective, Remembering):
        objective.after(backbone, batch, draws, rng)
    return seen[0]


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


class Trainer:
    """A run: everything that a recipe determines, and the loop over its steps."""

    def __init__(self, resolved: Resolved, folder: RunFolder, watch: Watch | None = None) -> None:
        self.recipe: Recipe = resolved.recipe
        self.folder, self.watch = folder, watch or (lambda kind, what: None)
        self.stop: Callable[[], bool] = lambda: False  # polled between steps
        self.parts = parts = put_together(self.recipe)
        self.task, self.splits, self.rng = parts.task, parts.splits, parts.rng
        self.backbone, self.objective, self.loader = parts.backbone, parts.objective, parts.loader
        self.optimizer, self.updater, self.ema = parts.optimizer, parts.updater, parts.ema
        self.guard, self.journal = Guard(), Journal(folder, tensorboard=self.recipe.run.tensorboard)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.seconds = 0.0
        self._redrawn = 0.0

    @property
    def step(self) -> int:
        """Steps done."""
        return self.loader.step

    @property
    def total_steps(self) -> int:
        return self.task.total_steps

    def run(self, until: int | None = None) -> None:
        """Train to the end of the recipe, or until `until` steps are done; then save."""
        run, last = self.recipe.run, min(until or self.total_steps, self.total_steps)
        self.watch("start", {"step": self.step, "total": self.total_steps, "epochs": run.epochs})
        self.backbone.model.train()
        with self._numerics(run.precision):
            try:
                while self.step < last:
                    if self.stop():
                        raise Preempted(f"stopped at step {self.step}; go on with --resume")
                    self.one_step()
                    if self.step % self.loader.steps_per_epoch == 0:
                        self.end_epoch()
                self.save()
            except Preempted:
                self.save()
                self.folder.event("preempted", step=self.step)
                raise
            except Diverged as error:
                raise self._diverged(error) from None

    def one_step(self) -> None:
        """Schedule, draw, update, log."""
        began = time.perf_counter()
        step, run = self.step, self.recipe.run
        factor = self.recipe.schedule.factor(step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * factor
        before = self.loader.state_dict()
        batch = self.loader.batch()
        try:
            terms = train_step(
                self.backbone,
                self.objective,
                self.updater,
                batch,
                self.rng,
                self.guard,
                run.theta_steps,
            )
        except BaseException:
            self.loader.load_state_dict(before)
            raise
        if self.ema is not None:
            self.ema.update(self.backbone.model)
        spent = time.perf_counter() - began
        self.seconds += spent
        known = {
            "step": step,
            "epoch": step // self.loader.steps_per_epoch + 1,
            "lr": self.recipe.optimizer.lr * factor,
            "images/s": round(len(batch.y) / spent, 1),
        }
        self.journal.note(known, terms, self.guard)
        if self.step % GATHER == 0 or self.journal.age > PATIENCE:
            self.watch("step", {**self.journal.gather(), "step": self.step})

    def end_epoch(self) -> None:
        """Validate, draw a sample grid, keep the best, save."""
        self.guard.settle()
        self.journal.gather()
        epoch = self.step // self.loader.steps_per_epoch
        exam = self.exam(epoch)
        with nullcontext() if self.ema is None else self.ema.applied(self.backbone.model):
            found = exam.validate(self.recipe.run.eval_images)
        entry = {"epoch": epoch, "step": self.step, **found, "seconds": round(self.seconds, 3)}
        self.history.append(entry)
        score = [found["pgd10"], found["accuracy"], epoch]
        if not self.best or score > self.best["score"]:
            self.best = {"epoch": epoch, "score": score}
            checkpoint.save(self.folder.checkpoints / "best", self.state_dict())
        exam.draw_grid(self.folder.samples / f"epoch-{epoch:04d}.png")
        self.save()
        self.folder.event("epoch", **entry)
        if self.step == self.total_steps or time.monotonic() > self._redrawn + REDRAW:
            save_curves(self.folder.path / "curves.png", self.folder.metrics(), self.history)
            self._redrawn = time.monotonic()
        self.watch("epoch", entry)

    def exam(self, epoch: int) -> Exam:
        """How the model is looked at after an epoch; 0 is for the end."""
        return Exam(self.backbone, self.task, self.splits, self.recipe.run.seed, epoch)

    def finish(self) -> Summary:
        """Judge the best epoch on the test split, at full size."""
        best = self.folder.checkpoints / "best"
        state = checkpoint.load(best)
        load_model(self.backbone.model, state["ema"] or state["model"])
        card = {
            "epoch": self.best["epoch"],
            "selection": "best PGD-10 accuracy on validation",
            "checkpoint": checkpoint.verify(best)[checkpoint.MODEL],
        }
        with self._numerics("fp32"):
            figures = self.exam(0).judge(card)
            self.exam(0).draw_energies(self.folder.path / "energies.png")
        epochs, epoch = self.recipe.run.epochs, self.best["epoch"]
        summary = Summary(self.folder.path, epochs, epoch, self.seconds, figures)
        self.folder.event("end", figures=[figure._asdict() for figure in figures])
        self.watch("end", {"summary": summary})
        return summary

    def save(self) -> None:
        """A checkpoint of this very step."""
        self.guard.settle()
        self.journal.gather()
        path = self.folder.checkpoints / f"step-{self.step:08d}"
        if not (path / checkpoint.MANIFEST).exists():  # the end of an epoch saved it already
            checkpoint.save(path, self.state_dict())
        checkpoint.prune(self.folder.checkpoints, self.recipe.run.keep)

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on depends on."""
        told = {"history": self.history, "best": self.best, "seconds": self.seconds}
        return {**self.parts.state_dict(), **told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parts.load_state_dict(state)
        self.history, self.best = list(state["history"]), dict(state["best"])
        self.seconds = state["seconds"]

    def _numerics(self, precision: Precision) -> AbstractContextManager[None]:
        run = self.recipe.run
        return numerics(precision=precision, deterministic=run.deterministic, threads=run.threads)

    def _diverged(self, error: Diverged) -> Diverged:
        self.journal.gather()
        newest = checkpoint.newest(self.folder.checkpoints)
        where = f"--init-from {newest} takes its weights" if newest else "no checkpoint was kept"
        self.folder.event("diverged", step=self.step, reason=str(error))
        return Diverged(
            f"diverged at step {self.step}: {error}. Begin a new run with a lower optimizer.lr, "
            f"more backbone.steps or backbone.density.penalty = 0.1; {where}"
        )
