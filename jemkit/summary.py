"""How a run ended: its best epoch, judged on the test split."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jemkit import checkpoint
from jemkit.assembly import load_model
from jemkit.errors import Preempted
from jemkit.figures import Figure
from jemkit.runtime.numerics import JUDGED_IN, numerics
from jemkit.team import alone

if TYPE_CHECKING:
    from jemkit.training import Trainer


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


def judged(trainer: "Trainer") -> Summary:
    """Load the best epoch's weights and judge them at full size."""
    best, folder, run = trainer.best["epoch"], trainer.folder, trainer.recipe.run
    path = folder.checkpoints / "best"
    state = checkpoint.load(path)
    card = {
        "epoch": best,
        "selection": "best PGD-10 accuracy on validation",
        "checkpoint": checkpoint.verify(path)[checkpoint.MODEL],
    }
    trainer.polling.begin()
    strict = numerics(precision=JUDGED_IN, deterministic=run.deterministic, threads=run.threads)
    with strict, alone(trainer.parts):
        load_model(trainer.backbone.model, state["ema"] or state["model"])
        try:
            with trainer.polling.passes(trainer.backbone.model, on=True):
                figures = trainer.exam(0).judge(card)
                trainer.exam(0).draw_energies(folder.path / "energies.png")
        except Preempted:  # all that was trained is saved
            folder.event("preempted", step=trainer.step)
            raise Preempted("stopped while it was judged; go on with --resume") from None
    summary = Summary(folder.path, run.epochs, best, trainer.seconds, figures)
    folder.event("end", figures=[figure._asdict() for figure in figures])
    trainer.watch("end", {"summary": summary})
    return summary
