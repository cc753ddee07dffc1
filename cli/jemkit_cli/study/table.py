"""The figures of a study: means over seeds, intervals, differences from the reference row."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jemkit.evaluation.run_table import Judged, differing, is_share, read_runs
from jemkit.metrics import record as records
from jemkit.metrics.figures import Figure, finite
from jemkit.metrics.record_file import Record
from jemkit.runtime.rng import generator
from jemkit_cli.study.plan import Study, Unit
from jemkit_cli.study.running import state_of

DRAWS, CHUNK = 2000, 250
"""Number of bootstrap samples of an interval, and how many are drawn at once."""


@dataclass(frozen=True)
class Cell:
    """One figure of a row."""

    values: list[float]  # one for each seed
    mean: float
    sd: float | None = None  # over seeds, divides by n - 1; None for one seed
    low: float | None = None  # 95 % interval over seeds and images; None where none is defined
    high: float | None = None
    share: bool = False  # shown as a percentage


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    name: str
    runs: list[str]
    checkpoints: list[str]  # SHA-256 of the weights
    seconds: list[float]  # of training
    cells: dict[str, Cell]
    why: dict[str, str]  # why a column has no figure
    difference: Cell | None  # from the reference row, in the compared figure
    diverged: int  # number of seeds
    paper: dict[str, float]
    by_seed: dict[str, list[Cell]] = field(default_factory=dict)  # protocols differ: without a mean


@dataclass(frozen=True)
class Table:
    """All lines of a study, with the protocol of each column."""

    study: Study
    lines: list[Line]
    protocols: dict[str, Figure] = field(default_factory=dict)  # a figure of each column
    apart: dict[str, list[str]] = field(default_factory=dict)  # entries in which rows differ

    def to_json(self) -> dict[str, Any]:
        """A number that is not finite becomes null."""
        whole = {
            "title": self.study.title,
            "seeds": list(self.study.seeds),
            "columns": list(self.study.columns),
            "reference": self.study.reference,
            "compared": self.study.compared,
            "paper": self.study.paper,
            "figure": self.study.figure,
            "settings": list(self.study.settings),
            "rows": [_plain(line) for line in self.lines],
            "protocols": {name: figure.protocol for name, figure in self.protocols.items()},
            "protocols_differ_in": self.apart,
        }
        return finite(whole)  # type: ignore[no-any-return]


def table_of(study: Study, units: Sequence[Unit]) -> Table:
    """The table of the complete runs; missing figures are empty."""
    groups = {row.name: [unit for unit in units if unit.row.name == row.name] for row in study.rows}
    by_seed = {name: _evaluated(group, study) for name, group in groups.items()}
    judged = {name: list(runs.values()) for name, runs in by_seed.items()}
    everything = list({run.folder: run for runs in judged.values() for run in runs}.values())
    apart = {
        name: [text.partition(" is ")[0] for text in differing(everything, name)]
        for name in study.columns
    }
    reference = by_seed.get(study.reference or "", {})
    lines = []
    for row in study.rows:
        runs, states = judged[row.name], [state_of(unit) for unit in groups[row.name]]
        cells = {name: cell for name in study.columns if (cell := _cell(runs, name)) is not None}
        own = by_seed[row.name] if row.name != study.reference else {}
        lines.append(Line(
            row.name,
            [str(run.folder) for run in runs],
            [str(run.record.protocol.get("checkpoint")) for run in runs],
            [state.trained["seconds"] for state in states if state.trained and not state.diverged],
            cells,
            {name: _why(runs, name) for name in study.columns if name not in cells},
            _difference(own, reference, study.compared) if not apart.get(study.compared) else None,
            sum(state.diverged for state in states),
            row.paper,
            {name: each for name in study.columns if (each := _by_seed(runs, name))},
        ))  # fmt: skip
    protocols = {
        name: figure for name in study.columns for run in everything[::-1]
        if (figure := run.figure(name)) is not None
    }  # fmt: skip
    return Table(study, lines, protocols, {name: keys for name, keys in apart.items() if keys})


def _evaluated(group: Sequence[Unit], study: Study) -> dict[int, Judged]:
    """The complete runs by seed, each with the record of the weights that the study evaluated."""
    seeds: list[int] = []
    complete: dict[Path, Record] = {}
    for unit in group:
        state = state_of(unit)
        whole = state.complete(study.evaluations(unit.row))
        if whole and (record := record_of(unit.folder, state.weights)) is not None:
            seeds.append(unit.seed)
            complete[unit.folder.resolve()] = record
    runs = read_runs(list(complete), complete.__getitem__) if complete else []
    return dict(zip(seeds, runs, strict=True))


def record_of(folder: Path, weights: str | None) -> Record | None:
    """The record of the weights with this SHA-256, or the last one; None if there is none."""
    if not (folder / records.JSON).exists():
        return None
    return records.load(folder) if weights is None else records.of_weights(folder, weights)


def _figures(runs: Sequence[Judged], name: str) -> list[Figure]:
    """The figure of every run; empty if one lacks it."""
    figures = [figure for run in runs if (figure := run.figure(name)) is not None]
    return figures if len(figures) == len(runs) else []


def _by_seed(runs: Sequence[Judged], name: str) -> list[Cell]:
    return [cell for run in runs if (cell := _cell([run], name))] if differing(runs, name) else []


def _cell(runs: Sequence[Judged], name: str) -> Cell | None:
    figures = _figures(runs, name)
    if not figures or differing(runs, name):
        return None
    values = [figure.value for figure in figures]
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Cell(values, mean, None, figures[0].low, figures[0].high, is_share(figures[0]))
    sd = statistics.stdev(values) if all(map(math.isfinite, values)) else None
    rows = _rows(runs, name)
    low, high = (None, None) if rows is None else _interval(rows)
    return Cell(values, mean, sd, low, high, is_share(figures[0]))


def _why(runs: Sequence[Judged], name: str) -> str:
    if not runs:
        return "not measured"
    figures = [run.figure(name) for run in runs]
    if all(figures):
        return "protocols differ"
    lacking = runs[figures.index(None)]
    reasons = list(lacking.record.left_out.values())
    return "left out" if reasons else "not measured"


def _rows(runs: Sequence[Judged], name: str) -> Tensor | None:
    """The outcome of every image of every run [seeds, images]; None if a run has none."""
    rows = []
    for run in runs:
        figure = run.figure(name)
        row = None if figure is None else run.record.rows_of(figure)
        if figure is None or row is None or abs(float(row.double().mean()) - figure.value) > 1e-6:
            return None
        rows.append(row.double())
    return torch.stack(rows) if rows and len({len(row) for row in rows}) == 1 else None


def _difference(
    own: Mapping[int, Judged], reference: Mapping[int, Judged], name: str
) -> Cell | None:
    """The row minus the reference, of the seeds that both have, image by image."""
    seeds = [seed for seed in own if seed in reference]
    a, b = (_rows([runs[seed] for seed in seeds], name) for runs in (own, reference))
    if a is None or b is None or a.shape != b.shape:
        return None
    gap = a - b
    values: list[float] = gap.mean(1).tolist()
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Cell(values, float(gap.mean()), sd, *_interval(gap), share=True)


def _interval(rows: Tensor) -> tuple[float, float]:
    """The 95 % percentile interval of the mean [seeds, images]; both are resampled."""
    rng = generator(torch.device("cpu"), 0, "study")
    seeds, images = rows.shape
    means = []
    for _ in range(DRAWS // CHUNK):
        drawn = torch.randint(images, (CHUNK, images), generator=rng)
        weights = torch.zeros(CHUNK, images, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(weights))
        each = weights @ rows.T / images  # [draws, seeds]
        chosen = torch.randint(seeds, (CHUNK, seeds), generator=rng)
        means.append(each.gather(1, chosen).mean(1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def _plain(line: Line) -> dict[str, Any]:
    cells = {name: vars(cell) for name, cell in line.cells.items()}
    by_seed = {name: [vars(cell) for cell in each] for name, each in line.by_seed.items()}
    return {
        **vars(line),
        "cells": cells,
        "by_seed": by_seed,
        "difference": line.difference and vars(line.difference),
    }
