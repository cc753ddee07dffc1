"""Metrics of a run, read from the device in batches so that steps do not synchronise."""

import time
from typing import Any

import torch
from torch import Tensor

from jemkit.objective import Terms
from jemkit.runtime import distributed
from jemkit.runtime.run_dir import RunFolder
from jemkit.runtime.timing import Stopwatch
from jemkit.training.tracking import Tracking
from jemkit.updaters import Guard

GATHER, PATIENCE = 20, 1.0
"""Steps, or seconds, between two readings of the metrics from the device."""


class Journal:
    """Keeps every step's metrics on the device until `gather` writes them to metrics.csv.

    `images/s` is the rate between two readings, which synchronise with the device. A single step
    does not synchronise, so on a GPU its time would be that of its launch.
    """

    def __init__(
        self, folder: RunFolder, tracking: Tracking | None = None,
        *, stopwatch: Stopwatch | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.stopwatch = folder, stopwatch or Stopwatch()
        self.tracking = tracking
        self.seconds = 0.0  # of all steps that were read
        self._gathered = time.monotonic()
        self._rows: list[tuple[dict[str, Any], list[str], Tensor]] = []
        self._images = 0

    @property
    def age(self) -> float:
        """Seconds since the last reading."""
        return time.monotonic() - self._gathered

    def note(self, known: dict[str, Any], images: int, terms: Terms, guard: Guard) -> None:
        """Add a step: its values on the host, and its tensors on the device."""
        self._images += images
        scalars: dict[str, Tensor] = {"loss": terms.total.detach()}
        scalars |= {f"loss {name}": part.detach() for name, (_, part) in terms.parts.items()}
        scalars |= terms.watched
        if guard.verdict is not None:
            scalars["gradient norm"] = guard.verdict.grad_norm
        self._rows.append(
            (known, list(scalars), torch.stack([t.float() for t in scalars.values()]))
        )

    def gather(self) -> list[dict[str, Any]]:
        """Write the collected rows, on rank 0, and return them."""
        self._gathered = time.monotonic()
        if not self._rows:
            self.stopwatch.read()
            return []
        values = iter(torch.cat([tensor for _, _, tensor in self._rows]).tolist())  # one reading
        spent = self.stopwatch.read()
        self.seconds += spent
        rate = {"images/s": round(self._images / spent, 1)}
        rows = [
            with_gaps({**known, **rate, **{name: next(values) for name in names}})
            for known, names, _ in self._rows
        ]
        self._rows, self._images = [], 0
        distributed.on_rank_zero(lambda: self._write(rows))
        return rows

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.folder.append_metrics(rows)
        if self.tracking is not None:
            self.tracking.rows(rows)


def with_gaps(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics with the differences of its mean energies added."""
    if "E(x+)" in row and "E(x-)" in row:
        row = {**row, "gap x+ x-": row["E(x+)"] - row["E(x-)"]}
    if "E(x~)" in row and "E(x)" in row:
        row = {**row, "gap x~ x": row["E(x~)"] - row["E(x)"]}
    return row
