"""Validation after each epoch, and the final evaluation of a run."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from jemkit.attacks.base import Threat
from jemkit.attacks.pgd import PGD
from jemkit.attacks.pixel_model import PixelModel
from jemkit.backbone import Backbone
from jemkit.config.eval_settings import Settings, protocol_card
from jemkit.config.recipe import Select
from jemkit.data import Images, Task, checked
from jemkit.metrics import charts
from jemkit.metrics import record as records
from jemkit.metrics.attack_runner import attacked
from jemkit.metrics.energy_gap import PGD20, Robustness, energies
from jemkit.metrics.evaluator import Accuracy, Context, Evaluator, Notes, measure
from jemkit.metrics.figures import Figure, histograms
from jemkit.metrics.plots import save_grid
from jemkit.metrics.record_file import Record
from jemkit.runtime.files import write_text
from jemkit.runtime.microbatch import MicroBatch, retry_on_oom
from jemkit.runtime.modes import eval_mode, frozen
from jemkit.runtime.rng import generator
from jemkit.sampling.init_dists import Labelled
from jemkit.selection import part_of
from jemkit.splits import Splits
from jemkit.training.build import RunState

FEWEST = 1000
"""Minimum number of test images in the final evaluation, if there are as many."""

PER_IMAGE = 44
"""Forward-pass equivalents per image of the final evaluation: accuracy, PGD-20 and energies."""

GRID, GRID_STEPS = 100, 40
"""Images in an epoch's sample grid, and the number of steps of their newly started chains."""


def is_better(score: list[float], best: list[float] | None, select: Select) -> bool:
    """Whether an epoch is better than the best so far; scores are PGD-10 accuracy, accuracy, epoch.

    The accuracy that `select` names decides, then the other one, then the later epoch.
    """
    order = (0, 1, 2) if select == "pgd10" else (1, 0, 2)
    return best is None or [score[at] for at in order] > [best[at] for at in order]


@dataclass(frozen=True)
class Validator:
    """Validates a backbone after an epoch, with its own generators and without the buffer."""

    backbone: Backbone
    task: Task
    splits: Splits
    seed: int
    epoch: int
    micro: MicroBatch = field(default_factory=MicroBatch)  # the run's: entries added here stay
    trained: Threat | None = None  # the ball in which the objective trains

    def validate(self, n_robust: int) -> dict[str, float]:
        """Validation accuracy, and under PGD-10 on its first `n_robust` images."""
        valid = self.splits.images("valid")
        part = Images(valid.x[:n_robust], valid.y[:n_robust])
        judge = Robustness(attack=PGD(steps=10))
        with self.micro.active():
            (clean,) = measure(self._subject(), valid, [Accuracy()], self._context("validate"))
            robust, *_ = measure(self._subject(), part, [judge], self._context("validate"))
        return {"accuracy": clean.value, "pgd10": robust.value}

    def draw_grid(self, path: Path) -> None:
        """Samples of newly started chains, by the classes of their initial distribution."""
        if not self.backbone.has_density:
            return
        with self.micro.active():
            samples = self._samples(self._generator("grid"))
        save_grid(path, self.task.bounds.to_unit(samples))

    def draw_energies(self, path: Path) -> None:
        """Histograms of E(x) of validation images, of PGD-20's and of samples (Figure 1)."""
        valid, ctx = self.splits.images("valid"), self._context("energies")
        subject = self._subject()
        with self.micro.active(), frozen(subject), eval_mode(subject):
            attacked_images = attacked(subject, PGD20, valid, ctx, "pgd")
            rows = {
                "clean": energies(subject, valid, ctx)[0],
                "PGD-20": energies(subject, Images(attacked_images.x_adv, valid.y), ctx)[0],
            }
            if self.backbone.has_density:
                samples = self.task.bounds.to_unit(self._samples(ctx.rng))
                rows["samples"] = subject.scores(samples).energy
        norm = {"Linf": "L-inf"}.get(ctx.threat.norm, ctx.threat.norm)
        attack = f"PGD-20 at {ctx.threat.radius_px:g}/255, {norm}"
        title = f"validation images; {attack}; chains of {GRID_STEPS} steps"
        table = histograms({name: energy.cpu().flatten() for name, energy in rows.items()})
        axes = charts.Axes(title, "E(x)", "share of images")
        chart, legend = charts.histograms(table, dict(zip(rows, rows, strict=True)), 0, axes)
        write_text(path, charts.picture([charts.Panel(title, chart, legend)]))

    def judge(self, about: dict[str, Any], images: int | None = None) -> Record:
        """Clean accuracy, PGD-20 and the energy gap on so many test images, or all, as a record.

        `about` describes the model. A figure has the same protocol as that of the same measurement
        in `jemkit evaluate`, which therefore replaces it.
        """
        test = checked(self.splits.images("test"), self.task.n_classes, "the test split")
        part = part_of(test, len(test.y) if images is None else images)
        ctx = replace(self._context("test"), seed=self.seed)
        settings = Settings(seed=self.seed, batch_size=ctx.batch_size)
        card = protocol_card(settings, ctx.threat, about, part, test, ctx.rng.device)
        ctx = replace(ctx, card=card)
        with self.micro.active():
            clean = self._measured("accuracy", part.images, Accuracy(), ctx)
            start = records.left_by(ctx.notes)
            parts = [records.part("accuracy", clean, ctx, records.left_by(Notes()))]
            robust, *gaps = self._measured("robustness", part.images, Robustness(), ctx)
        parts.append(records.part("robustness", [robust], ctx, start))
        gaps = [gap._replace(protocol={**gap.protocol, "evaluator": "energies"}) for gap in gaps]
        parts.append(records.part("energies", gaps, ctx, records.left_by(ctx.notes)))
        notes, figures = ctx.notes, [*clean, robust, *gaps]
        return records.arranged(
            Record(about, card, figures, notes.tables, notes.rows, {}, notes.warnings, parts)
        )

    def _measured(
        self, name: str, data: Images, evaluator: Evaluator, ctx: Context
    ) -> list[Figure]:
        named = replace(ctx, card={**ctx.card, "evaluator": name})
        return measure(self._subject(), data, [evaluator], named)

    def _samples(self, rng: Generator) -> Tensor:
        """GRID images in the model's range, in the order of their initial classes."""
        density = self.backbone.density
        y = torch.arange(GRID, device=rng.device) * min(self.task.n_classes, 10) // GRID
        start = Labelled(density.start, y)
        draw = partial(density.sample, self.backbone.model, GRID, rng, steps=GRID_STEPS)
        return retry_on_oom(partial(draw, start=start), rng)

    def _subject(self) -> PixelModel:
        return PixelModel(self.backbone.model, self.task.bounds)

    def _context(self, name: str) -> Context:
        rng = self._generator(name)
        return Context(rng, self.threat, seed=rng.initial_seed())

    @property
    def threat(self) -> Threat:
        """The data set's default threat; that of training if its norm differs."""
        if self.trained is not None and self.trained.norm != "Linf":
            return self.trained
        return Threat("Linf", self.task.radius_px)

    def _generator(self, name: str) -> Generator:
        """Seeded by the seed, the epoch and the name of its purpose."""
        device = next(self.backbone.model.parameters()).device
        return generator(device, self.seed, self.epoch, name)


def images_to_judge(parts: RunState, requested: int | None) -> int:
    """The images that are `requested`, or as many as take a tenth of the passes of training.

    Forward and backward passes of the updates and the chains are counted, so that the number
    depends on the recipe alone and not on a clock.
    """
    if requested is not None:
        return requested
    density = parts.backbone.density_or_none
    steps = density.steps if density else 0
    passes = parts.task.total_steps * parts.loader.batch_size * (2 + 2 * steps)
    return max(FEWEST, passes // (10 * PER_IMAGE))
