"""Comparison of runs: figures with one protocol, paired differences, means over seeds."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jemkit.config.layers import flat
from jemkit.errors import DataError
from jemkit.evaluation.run_table import (
    Judged,
    Line,
    aligned,
    comparison,
    differing,
    distinguishing_settings,
    is_share,
    read_runs,
)
from jemkit.metrics import record as records
from jemkit.metrics.figures import Figure, finite, paired_difference
from jemkit.runtime.rng import generator
from jemkit.training import mixing
from jemkit.training.resuming import may_differ


class Difference(NamedTuple):
    """Mean of a - b over the same images, with its 95 % interval from a paired bootstrap."""

    name: str
    mean: float
    low: float
    high: float
    n: int
    why: str = ""  # there is none
    protocol: str = ""  # what distinguishes it from others of its name

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high


class Spread(NamedTuple):
    """A figure over seeds: mean and standard deviation, divided by n - 1."""

    runs: list[str]
    name: str
    values: list[float]
    mean: float
    sd: float | None  # None for a single seed
    why: str = ""  # there is none
    settings: dict[str, Any] = {}  # those in which the groups of runs differ
    seeds: list[Any] = []
    protocol: str = ""  # what distinguishes the figure from others of its name
    share: bool = False  # whether it is shown as a percentage


@dataclass(frozen=True)
class Comparison:
    """The result of `jemkit compare`."""

    runs: list[str]
    lines: list[Line]
    differences: list[Difference]
    spreads: list[Spread]

    def to_json(self) -> dict[str, Any]:
        """A number that is not finite becomes null."""
        lines = [
            {
                "name": line.column.name,
                "title": line.column.title,
                "figures": [f and f._asdict() for f in line.figures],
                "missing": line.why,
                "best": [self.runs[i] for i in line.best],
                "differs": line.differs,
            }
            for line in self.lines
        ]
        differences = [
            {**d._asdict(), "holds_zero": None if d.why else d.holds_zero} for d in self.differences
        ]
        spreads = [spread._asdict() for spread in self.spreads]
        whole = {"runs": self.runs, "lines": lines, "paired": differences, "seeds": spreads}
        return finite(whole)  # type: ignore[no-any-return]


def compare(
    folders: Sequence[Path], *, names: Sequence[str] = (), seeds: bool = False
) -> Comparison:
    """Compare runs; for two runs also compute paired differences over the images."""
    runs = read_runs(folders, records.load)
    lines = comparison(runs, names)
    differences = paired(runs[0], runs[1]) if len(runs) == 2 else []
    if names:
        differences = [d for d in differences if d.name in names]
    spreads = over_seeds(runs, [line.column.name for line in lines]) if seeds else []
    return Comparison([run.name for run in runs], lines, differences, spreads)


def paired(a: Judged, b: Judged, resamples: int = 10_000) -> list[Difference]:
    """Clean accuracy and accuracy under each attack, a minus b, if the images are the same."""
    names = dict.fromkeys(figure.name for figure in a.record.figures)
    differences = []
    for name in (name for name in names if b.figure(name) is not None):
        rows = [(x, y) for x, y in aligned([a, b], name) if x is not None and y is not None]
        for (x, y), words in zip(rows, distinguishing_settings([x for x, _ in rows]), strict=True):
            pair = a.record.rows_of(x), b.record.rows_of(y)
            if pair[0] is not None and pair[1] is not None:
                differences.append(_difference((a, x, pair[0]), (b, y, pair[1]), words, resamples))
    return differences


def over_seeds(runs: Sequence[Judged], names: Sequence[str]) -> list[Spread]:
    """Each figure's mean and standard deviation over runs that differ only in the seed."""
    groups: dict[str, list[Judged]] = {}
    recipes: dict[str, dict[str, Any]] = {}
    for run in runs:
        recipe = _but_seed(run)
        key = json.dumps(recipe, sort_keys=True) if recipe else str(run.folder)
        groups.setdefault(key, []).append(run)
        recipes.setdefault(key, recipe)
    options = sorted({option for recipe in recipes.values() for option in recipe})
    varied = [o for o in options if len({json.dumps(r.get(o)) for r in recipes.values()}) > 1]
    return [
        spread
        for key, group in groups.items()
        for name in dict.fromkeys(names)
        for spread in _spread(
            group, name, {o: recipes[key][o] for o in varied if o in recipes[key]}
        )
    ]


def _spread(group: list[Judged], name: str, settings: dict[str, Any]) -> Iterator[Spread]:
    rows = [row for row in aligned(group, name) if any(row)]
    descriptions = distinguishing_settings([next(f for f in row if f) for row in rows])
    for row, words in zip(rows, descriptions, strict=True):
        having = [(run, figure) for run, figure in zip(group, row, strict=True) if figure]
        names, values = [run.name for run, _ in having], [figure.value for _, figure in having]
        seeds = [run.config.get("recipe", {}).get("run", {}).get("seed") for run, _ in having]
        about = Spread(names, name, values, math.nan, None, "", settings, seeds, words)
        differs = differing(group, name, row)
        if differs:
            yield about._replace(why="; ".join(differs))
            continue
        finite_all = len(values) > 1 and all(map(math.isfinite, values))
        spread = statistics.stdev(values) if finite_all else None
        share = is_share(having[0][1])
        yield about._replace(mean=math.fsum(values) / len(values), sd=spread, share=share)


def _difference(
    one: tuple[Judged, Figure, Tensor],
    two: tuple[Judged, Figure, Tensor],
    words: str,
    resamples: int,
) -> Difference:
    (a, figure, x), (b, other, y) = one, two
    name = figure.name
    why = "; ".join(differing([a, b], name, [figure, other]))
    for run, row, of in ((a, x, figure), (b, y, other)):  # another evaluation may have left either
        if row.shape != (of.n,) or abs(float(row.double().mean()) - of.value) >= 1e-6:
            why = why or f"the rows of {run.name} are not those of its figure"
    if why:
        return Difference(name, math.nan, math.nan, math.nan, 0, why, words)
    rng = generator(torch.device("cpu"), 0, "paired", name)
    interval = paired_difference(x, y, rng, resamples)
    return Difference(name, *interval, len(x), "", words)


def _but_seed(run: Judged) -> dict[str, Any]:
    """The settings that change a run's outcome.

    Images, also generated ones, are compared by their hash if the run has recorded it, and not by
    their folder.
    """
    recipe = dict(flat(run.config.get("recipe", {})))
    folder = recipe.get("data.dir")
    recipe = {key: value for key, value in recipe.items() if not may_differ(key)}
    recipe.pop("run.seed", None)
    if folder is not None:
        pin = dict(flat(run.config.get("data") or {}))
        shas = [pin.get(f"{split}.sha256") for split in ("train", "valid", "test")]
        known = None not in shas
        recipe["data.images" if known else "data.dir"] = shas if known else folder
    generated = run.config.get(mixing.ENTRY)
    if isinstance(generated, dict):
        recipe["extra.images"] = mixing.identity(generated)
    return recipe


def newest(runs: Path, count: int = 2) -> list[Path]:
    """The most recently started runs of a folder that have figures, the newest last."""
    begun = [path for path in runs.glob("*/config.json") if not path.parent.is_symlink()]
    finished = [path for path in begun if (path.parent / records.JSON).exists()]
    finished.sort(key=lambda path: (path.stat().st_mtime, path.parent.name))
    if len(finished) < count:
        raise DataError(
            f"runs with figures in {runs}: {len(finished)}, and a comparison needs {count}; train "
            "another, evaluate one that was not (`jemkit evaluate`), or name the runs"
        )
    return [path.parent for path in finished[-count:]]
