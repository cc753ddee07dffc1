"""Trackers: what receives a run's figures while it trains, such as an experiment tracker."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jemkit.metrics.figures import Figure

Figures = Mapping[str, float]
"""Values by name."""

Status = Literal["finished", "preempted", "failed"]
"""How a run ended: complete, saved by a signal to be resumed, or with an error."""

CALLBACKS = ("on_begin", "on_step", "on_epoch", "on_evaluation", "on_rollback", "on_end")


class TrackedRun(NamedTuple):
    """A run at its beginning, or where it resumes."""

    folder: Path  # its name is that of the run
    recipe: dict[str, Any]  # every setting, as in config.json
    step: int  # 0, or the step that the run resumes from
    total_steps: int
    stored: dict[str, Any]  # what the tracker stored before, such as an id
    store: Callable[[dict[str, Any]], None]  # saves values of JSON in the run's folder


class Tracker:
    """Receives a run's figures; a subclass overrides the callbacks that it needs.

    All are called on the first process, between two steps, with values on the host. An exception
    switches the tracker off, and training goes on.
    """

    def on_begin(self, run: TrackedRun) -> None:
        """The run's folder exists; no step is taken yet."""

    def on_step(self, step: int, figures: Figures) -> None:
        """A row of metrics.csv. Rows are read from the device once for up to 20 steps."""

    def on_epoch(self, step: int, figures: Figures) -> None:
        """The figures of the validation images after an epoch, as in events.jsonl."""

    def on_evaluation(self, step: int, figures: Sequence[Figure]) -> None:
        """The figures of the best epoch on the test split, as in evaluation.json."""

    def on_rollback(self, step: int) -> None:
        """The run diverged: figures of this step and of later ones are replaced."""

    def on_end(self, status: Status) -> None:
        """Called once after the last figures, also when the run ends with an error."""


class ScalarTracker(Tracker):
    """A tracker with one method, `log`, for all figures.

    Figures of the validation images are named `valid/NAME`, those of the test split `test/NAME`.
    """

    def log(self, step: int, figures: Figures) -> None:
        """Figures of a step."""
        raise NotImplementedError

    def on_step(self, step: int, figures: Figures) -> None:
        self.log(step, figures)

    def on_epoch(self, step: int, figures: Figures) -> None:
        self.log(step, {f"valid/{name}": value for name, value in figures.items()})

    def on_evaluation(self, step: int, figures: Sequence[Figure]) -> None:
        self.log(step, {f"test/{figure.name}": figure.value for figure in figures})


@runtime_checkable
class TrackerSpec(Protocol):
    """The options of a tracker; a registered part, so its fields are its options."""

    def build(self) -> Tracker:
        """The tracker. Raises ConfigError here if a package is missing: nothing has begun yet."""
