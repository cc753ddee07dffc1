"""How a run ended: its best epoch, judged on the test split."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jemkit import checkpoint
from jemkit import record as records
from jemkit.assembly import load_model
from jemkit.errors import Preempted
from jemkit.evaluator import Notes
from jemkit.figures import Figure
from jemkit.restoring import about_checkpoint, about_parts
from jemkit.runtime.numerics import judging
from jemkit.saved import weights_of
from jemkit.team import alone

if TYPE_CHECKING:
    from jemkit.training import Trainer


FEWEST = 1000
"""Test images that are judged at least, where there are as many."""

PER_IMAGE = 44
"""Passes of one image that its judgement takes: clean accuracy, PGD-20 and the energies."""


Watch = Callable[[str, dict[str, Any]], None]
"""Told of a run's "start", "step", "epoch", "rollback", "compiled" and "end", with what to show."""


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


def images_to_judge(trainer: "Trainer") -> int:
    """`run.test_images`, else what takes a tenth of the passes of one image that training took.

    Counted are the passes forward and back of the update and of the chains, so that the number
    depends on the recipe alone and on no clock.
    """
    asked = trainer.recipe.run.test_images
    if asked is not None:
        return asked
    steps = trainer.backbone.density.steps if trainer.backbone.has_density else 0
    passes = trainer.total_steps * trainer.loader.batch_size * (2 + 2 * steps)
    return max(FEWEST, passes // (10 * PER_IMAGE))


def judged(trainer: "Trainer") -> Summary:
    """Load the best epoch's weights and judge them at full size."""
    best, folder, run = trainer.best["epoch"], trainer.folder, trainer.recipe.run
    path = folder.checkpoints / "best"
    state = checkpoint.load(path)
    about = about_checkpoint(folder.path.resolve(), path, averaged=bool(state["ema"]))
    about |= about_parts(trainer.tables, trainer.recipe, trainer.task.radius_px)
    trainer.polling.begin()
    strict = judging(trainer.parts.device, deterministic=run.deterministic, threads=run.threads)
    with strict, alone(trainer.parts):
        load_model(trainer.backbone.model, weights_of(state, path)[0])
        try:
            with trainer.polling.passes(trainer.backbone.model, on=True):
                found = trainer.exam(0).judge(about, images_to_judge(trainer))
                trainer.exam(0).draw_energies(folder.path / "energies.png")
        except Preempted:  # all that was trained is saved
            folder.event("preempted", step=trainer.step)
            raise Preempted("stopped while it was judged; go on with --resume") from None
    records.save(folder.path, found, Notes())
    summary = Summary(folder.path, run.epochs, best, trainer.seconds, found.figures)
    folder.event("end", figures=[figure._asdict() for figure in found.figures])
    trainer.watch("end", {"summary": summary})
    return summary
