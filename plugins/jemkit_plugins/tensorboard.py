"""The tracker tensorboard: event files in the run's folder."""

from collections.abc import Mapping
from typing import Any

from jemkit import (
    ConfigError, Figures, Options, ScalarTracker, Status, TrackedRun, Tracker, TrackerSpec,
    hookimpl,
)  # fmt: skip
from jemkit.runtime.extras import install


class Board(ScalarTracker):
    """Writes scalars with the names of metrics.csv; a space is a slash, which groups them."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer  # its class

    def on_begin(self, run: TrackedRun) -> None:
        self.folder = run.folder / "tensorboard"
        self.restart(run.step)

    def restart(self, step: int) -> None:
        """Events of this step and of later ones, from before a resumption, are not shown."""
        self.board: Any = self.writer(self.folder, purge_step=step)

    def log(self, step: int, figures: Figures) -> None:
        for name, value in figures.items():
            self.board.add_scalar(name.replace(" ", "/"), value, step)

    def on_epoch(self, step: int, figures: Figures) -> None:
        """At the epoch's last step: a run that resumes after it does not hide them."""
        super().on_epoch(max(0, step - 1), figures)

    def on_rollback(self, step: int) -> None:
        self.board.close()
        self.restart(step)

    def on_end(self, status: Status) -> None:
        self.board.close()


class TensorBoard(Options):
    """Event files of TensorBoard in the folder `tensorboard` of the run."""

    def build(self) -> Tracker:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                f"the tracker tensorboard needs the package tensorboard: {install('tensorboard')}"
            ) from None
        return Board(SummaryWriter)


@hookimpl
def jemkit_trackers() -> Mapping[str, type[TrackerSpec]]:
    return {"tensorboard": TensorBoard}
