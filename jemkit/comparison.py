"""Several runs beside each other: figures of one protocol, paired differences, seeds."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jemkit import record as records
from jemkit.figures import Figure, paired_difference
from jemkit.layers import flat
from jemkit.record import finite
from jemkit.seeds import generator
from jemkit.trilemma import Judged, Line, differing, read_runs, trilemma


class Difference(NamedTuple):
    """Mean of a - b over the same images, with its 95 % interval of the paired bootstrap."""

    name: str
    mean: float
    low: float
    high: float
    n: int
    why: str = ""  # there is none

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high


class Spread(NamedTuple):
    """A figure over seeds: mean and standard deviation, which divides by n - 1."""

    runs: list[str]
    name: str
    values: list[float]
    mean: float
    sd: float | None  # None for a single seed
    why: str = ""  # there is none


@dataclass(frozen=True)
class Comparison:
    """All that `jemkit compare` tells."""

    runs: list[str]
    lines: list[Line]
    differences: list[Difference]
    spreads: list[Spread]

    def to_json(self) -> dict[str, Any]:
        """A number that is not finite becomes null."""
        lines = [
            {
                "name": line.column.name,
                "figures": [f and f._asdict() for f in line.figures],
                "missing": line.why,
                "best": [self.runs[i] for i in line.best],
                "differs": line.differs,
            }
            for line in self.lines
        ]
        differences = [{**d._asdict(), "holds_zero": d.holds_zero} for d in self.differences]
        spreads = [spread._asdict() for spread in self.spreads]
        whole = {"runs": self.runs, "lines": lines, "paired": differences, "seeds": spreads}
        return finite(whole)  # type: ignore[no-any-return]


def compare(
    folders: Sequence[Path], *, names: Sequence[str] = (), seeds: bool = False
) -> Comparison:
    """Put runs side by side; of two also the paired differences, image by image."""
    runs = read_runs(folders, records.load)
    lines = trilemma(runs, names)
    differences = paired(runs[0], runs[1]) if len(runs) == 2 else []
    if names:
        differences = [d for d in differences if d.name in names]
    spreads = over_seeds(runs, [line.column.name for line in lines]) if seeds else []
    return Comparison([run.name for run in runs], lines, differences, spreads)


def paired(a: Judged, b: Judged, resamples: int = 10_000) -> list[Difference]:
    """Clean accuracy and accuracy under each attack, a less b, where the images are the same."""
    shared = [
        name
        for name in a.record.rows
        if name in b.record.rows and a.figure(name) is not None and b.figure(name) is not None
    ]
    return [_difference(a, b, name, resamples) for name in shared]


def over_seeds(runs: Sequence[Judged], names: Sequence[str]) -> list[Spread]:
    """Each figure's mean and spread over runs whose recipes differ in run.seed alone."""
    groups: dict[str, list[Judged]] = {}
    for run in runs:
        groups.setdefault(_recipe_but_seed(run), []).append(run)
    return [s for group in groups.values() for name in names for s in _spread(group, name)]


def _spread(group: list[Judged], name: str) -> Iterator[Spread]:
    figures = [(run.name, run.figure(name)) for run in group]
    having = [(run, figure.value) for run, figure in figures if figure is not None]
    if not having:
        return
    names, values = [run for run, _ in having], [value for _, value in having]
    differs = differing(group, name)
    if differs:
        yield Spread(names, name, values, math.nan, None, "; ".join(differs))
        return
    finite_all = len(values) > 1 and all(map(math.isfinite, values))
    spread = statistics.stdev(values) if finite_all else None
    yield Spread(names, name, values, math.fsum(values) / len(values), spread)


def _difference(a: Judged, b: Judged, name: str, resamples: int) -> Difference:
    x, y = a.record.rows[name], b.record.rows[name]
    why = "; ".join(differing([a, b], name))
    for run, row in ((a, x), (b, y)):
        figure = run.figure(name)
        if figure is not None and not _rows_of(row, figure):
            why = why or f"the rows of {run.name} are not those of its figure"
    if why:
        return Difference(name, math.nan, math.nan, math.nan, 0, why)
    rng = generator(torch.device("cpu"), 0, "paired", name)
    return Difference(name, *paired_difference(x, y, rng, resamples), len(x))


def _rows_of(row: Tensor, figure: Figure) -> bool:
    """Whether a figure is the mean of these rows; another evaluation may have left either."""
    return row.shape == (figure.n,) and abs(float(row.double().mean()) - figure.value) < 1e-6


def _recipe_but_seed(run: Judged) -> str:
    recipe = dict(flat(run.config.get("recipe", {})))
    recipe.pop("run.seed", None)
    if run.config.get("origins", {}).get("run.channels_last") == "measured":
        recipe["run.channels_last"] = "measure"  # which is what the recipe said
    return json.dumps(recipe, sort_keys=True) if recipe else str(run.folder)
