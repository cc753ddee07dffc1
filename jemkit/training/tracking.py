"""The logs of a run's events and figures, and the trackers that receive the same figures."""

import logging
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from operator import methodcaller
from pathlib import Path
from types import TracebackType
from typing import Any

from jemkit.config.layers import Table
from jemkit.errors import DataError, Preempted
from jemkit.metrics.figures import Figure
from jemkit.metrics.tracker import Figures, Status, TrackedRun, Tracker, TrackerSpec
from jemkit.runtime import distributed
from jemkit.runtime.files import read_json, write_json
from jemkit.runtime.opening import make_folder
from jemkit.runtime.run_dir import TRACKERS, RunFolder

log = logging.getLogger(__name__)


class Tracking:
    """Writes a run's events, and calls its trackers, on rank 0 alone.

    A tracker that raises is switched off, with one warning and one event: no tracker ends a run.
    """

    def __init__(self, specs: Mapping[str, TrackerSpec], folder: RunFolder) -> None:
        self.folder = folder
        first = distributed.shard().rank == 0
        built = distributed.prepared(lambda: {n: s.build() for n, s in specs.items() if first})
        self._waiting: dict[str, Tracker] = built  # until the run begins
        self._active: dict[str, Tracker] = {}

    def begin(self, recipe: Table, step: int, total_steps: int) -> None:
        """The run's folder exists: open the trackers."""
        self._active, self._waiting = self._waiting, {}
        for name in [*self._active]:
            path = self.folder.path / TRACKERS / f"{name}.json"
            about = self.folder.path, deepcopy(recipe), step, total_steps
            run = TrackedRun(*about, _stored(path), partial(_store, path))
            self._call(name, methodcaller("on_begin", run))

    def rows(self, rows: list[dict[str, Any]]) -> None:
        """Rows of metrics.csv."""
        for row in rows:
            figures = {name: value for name, value in row.items() if name != "step"}
            self._each(partial(_step, row["step"], figures))

    def epoch(self, entry: dict[str, Any]) -> None:
        """What validation finds after an epoch."""
        self.folder.event("epoch", **entry)
        figures = {name: value for name, value in entry.items() if name not in ("epoch", "step")}
        self._each(lambda tracker: tracker.on_epoch(entry["step"], {**figures}))

    def evaluation(self, step: int, figures: list[Figure]) -> list[dict[str, Any]]:
        """The figures of the test split; returns them as JSON has them."""
        records = [figure._asdict() for figure in figures]
        self.folder.event("end", figures=records)
        self._each(lambda tracker: tracker.on_evaluation(step, deepcopy(figures)))
        return records

    def rollback(self, entry: dict[str, Any], step: int) -> None:
        """The run goes on from this step."""
        self.folder.event("rollback", **entry)
        self._each(lambda tracker: tracker.on_rollback(step))

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        """Close the trackers that were opened."""
        status: Status = "finished"
        if kind is not None:
            status = "preempted" if issubclass(kind, Preempted) else "failed"
        self._each(lambda tracker: tracker.on_end(status))
        self._active = {}

    def _each(self, callback: Callable[[Tracker], None]) -> None:
        for name in [*self._active]:
            self._call(name, callback)

    def _call(self, name: str, callback: Callable[[Tracker], None]) -> None:
        try:
            callback(self._active[name])
        except (Exception, SystemExit) as error:  # whatever a tracker raises, the run goes on
            del self._active[name]
            what = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}".strip(": "))[:500]
            message = (
                f"the tracker {name} raised {what}. It is switched off, and the run goes on; "
                "metrics.csv and events.jsonl have every figure"
            )
            log.warning("%s", message, exc_info=log.isEnabledFor(logging.DEBUG))
            self.folder.event("tracker", name=name, message=message)


def _step(step: int, figures: Figures, tracker: Tracker) -> None:
    tracker.on_step(step, {**figures})


def _store(path: Path, values: dict[str, Any]) -> None:
    """Save values of a tracker in the run's folder."""
    make_folder(path.parent)
    write_json(path, values)


def _stored(path: Path) -> dict[str, Any]:
    """What a tracker stored in an earlier part of the run; nothing if the file is damaged."""
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
    except DataError as error:
        log.warning("%s; the tracker ignores it", error)
        return {}
    return values if isinstance(values, dict) else {}
