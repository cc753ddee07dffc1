"""The figures of several runs: accuracy, robustness and generation, and their comparability."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jemkit.config.layers import flat
from jemkit.errors import ConfigError, DataError
from jemkit.metrics.figures import RESULTS, Figure, canonical
from jemkit.metrics.record_file import Record, preferred
from jemkit.runtime.files import read_json

NOT_PROTOCOL = RESULTS | {
    "checkpoint", "versions", "device", "evaluator", "trained_radius_px", "trained_norm",
    "seed", "batch_size", "why",
}  # fmt: skip
"""Entries of a card that describe the model, the machine, chance or the result."""


UNKNOWN_BEFORE = ("test_sha256", "ood_sha256", "precision", "image_px")
"""Entries that cards before 0.2.0 do not have; compared if every card has them."""


class Judged(NamedTuple):
    """A run with its record and its recipe."""

    name: str
    folder: Path
    record: Record
    config: dict[str, Any]  # empty if there is no recipe

    def figure(self, name: str) -> Figure | None:
        """As `Record.figure`; None where there is none."""
        matches = [figure for figure in self.record.figures if figure.name == name]
        return preferred(matches) if matches else None

    def figures(self, name: str) -> dict[str, Figure]:
        """A figure for each protocol with which the name was measured, the preferred one first."""
        groups: dict[str, list[Figure]] = {}
        for figure in self.record.figures:
            if figure.name == name:
                card = {k: v for k, v in _measured(figure).items() if k not in UNKNOWN_BEFORE}
                signature = json.dumps(card, sort_keys=True, default=str)
                groups.setdefault(signature, []).append(figure)
        preferred_figures = {signature: preferred(figures) for signature, figures in groups.items()}
        first = self.figure(name)
        return dict(sorted(preferred_figures.items(), key=lambda entry: entry[1] is not first))


class Column(NamedTuple):
    """A figure of the comparison: accuracy, robustness, generation."""

    name: str
    title: str
    better: int  # 1 where higher is better, -1 where lower is
    source: str  # the option of `jemkit evaluate` that measures it
    evaluator: str


COLUMNS = (
    Column("clean", "Clean", 1, "--only accuracy", "accuracy"),
    Column("aa", "AA", 1, "--attack aa --only robustness", "robustness"),
    Column("pgd20", "PGD-20", 1, "--attack pgd --only robustness", "robustness"),
    Column("fid", "FID", -1, "--only generation", "generation"),
    Column("gap_mean", "Energy gap", -1, "--only energies", "energies"),
    Column("ece", "ECE", -1, "--only calibration", "calibration"),
    Column("auroc", "AUROC", 1, "--only ood", "ood"),
)
HASH = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{56}\b")  # a SHA-256 is shown by its first digits

UNATTACKED = (
    "clean", "ece", "nll", "brier", "temperature", "auroc", "aupr", "fpr95", "fid", "fd", "kid",
    "kd", "is", "precision", "recall",
)  # fmt: skip
"""Figures that do not depend on norm and radius, unless their card names an attack."""

HIGHER = ("clean", "auroc", "aupr", "is", "precision", "recall")
LOWER = ("fid", "fd", "kid", "kd", "gap", "ece", "nll", "brier", "fpr95")


class Line(NamedTuple):
    """One figure of every run."""

    column: Column
    figures: list[Figure | None]
    why: list[str]  # why a figure is missing; else empty
    differs: list[str]  # how the protocols differ; if they do, the figures cannot be compared

    @property
    def best(self) -> list[int]:
        """The best runs; none if there is no choice."""
        finite = [(i, f.value) for i, f in enumerate(self.figures) if f and math.isfinite(f.value)]
        if self.differs or len(finite) < 2 or not self.column.better:
            return []
        top = max(value * self.column.better for _, value in finite)
        best = [i for i, value in finite if value * self.column.better == top]
        return best if len(best) < len(finite) else []


def read_runs(folders: Sequence[Path], read: Callable[[Path], Record]) -> list[Judged]:
    """Each run with a unique name."""
    missing = next((folder for folder in folders if not Path(folder).resolve().exists()), None)
    if missing is not None:
        raise DataError(f"{missing} does not exist; pass a run folder, or train a run first")
    paths = [Path(folder).resolve() for folder in folders]
    if not paths:
        raise ConfigError("no run was given; pass one or more run folders")
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} was given twice; pass each run once")
    runs = []
    for name, path in zip(_names(paths), paths, strict=True):
        recipe = path / "config.json"
        config = read_json(recipe) if recipe.exists() else {}
        runs.append(Judged(name, path, read(path), config if isinstance(config, dict) else {}))
    return runs


def comparison(runs: Sequence[Judged], names: Sequence[str] = ()) -> list[Line]:
    """The main figures of a JEM, or the named ones, of every run."""
    return [line for column in _columns(runs, names) for line in _lines(column, runs)]


def differing(
    runs: Sequence[Judged], name: str, figures: Sequence[Figure | None] | None = None
) -> list[str]:
    """The differences between the protocols of a figure, over the runs that have it."""
    figures = [run.figure(name) for run in runs] if figures is None else figures
    having = [(run, f) for run, f in zip(runs, figures, strict=True) if f is not None]
    cards = {r.name: {"data": r.record.subject.get("data"), **_measured(f)} for r, f in having}
    return _apart(cards)


def other_images(runs: Sequence[Judged], table: str = "") -> list[str]:
    """The differences between the images on which the runs, or their tables, were evaluated."""
    cards: dict[str, dict[str, Any]] = {}
    for run in runs:
        card = run.record.card_of("tables", table)
        cards[run.name] = {key: card.get(key) for key in ("split", "images", "selection")}
        cards[run.name]["data"] = run.record.subject.get("data")
    return _apart(cards)


def aligned(runs: Sequence[Judged], name: str) -> list[list[Figure | None]]:
    """All figures of a name in rows: each row has figures with one protocol.

    Runs with protocols that no other run has share a row, which then states the differences.
    """
    left = [run.figures(name) for run in runs]
    count = Counter(signature for figures in left for signature in figures)
    shared = [s for s, n in count.items() if n > 1 or len(runs) == 1]
    first = {s: next(figures[s] for figures in left if s in figures) for s in shared}
    shared.sort(key=lambda s: (-count[s], not first[s].protocol.get("standard")))
    rows = [[figures.pop(s, None) for figures in left] for s in shared]
    unmatched = [figures for at, figures in enumerate(left) if not any(row[at] for row in rows)]
    if sum(map(bool, unmatched)) > 1 or not rows:
        firsts = [next(iter(figures), "") if figures in unmatched else "" for figures in left]
        rows.append([figures.pop(s, None) for figures, s in zip(left, firsts, strict=True)])
    for at, figures in enumerate(left):
        rows += [[f if i == at else None for i in range(len(runs))] for f in figures.values()]
    return rows


def distinguishing_settings(figures: Sequence[Figure]) -> list[str]:
    """What distinguishes the protocols of figures with the same name; empty for a single one."""
    cards = [_measured(figure) for figure in figures]
    keys = sorted({key for card in cards for key in card})
    different = [k for k in keys if len({json.dumps(c.get(k), default=str) for c in cards}) > 1]
    return [", ".join(_words(card, different)) for card in cards]


def _words(card: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    words = []
    if {"norm", "radius_px"} & set(keys):
        norm = f"{card.get('norm')} " if "norm" in keys else ""
        words.append(f"{norm}{card.get('radius_px') or 0:g}/255")
    if {"images", "data_sha256", "selection"} & set(keys):
        words.append(f"{card.get('images')} images")
    known = ("norm", "radius_px", "images", "data_sha256", "selection", "standard", "quick")
    radius = card.get("radius_px") or 0.0
    usual = card.get("step_px") == radius / 4  # which is part of the radius
    others = [key for key in keys if key not in known and card.get(key) is not None]
    others = [key for key in others if key != "step_px" or not usual]
    words += [f"{key.split('.')[-1].replace('_', ' ')} {card[key]}" for key in others[:3]]
    if "quick" in keys and card.get("quick"):
        words.append("quick")
    elif "standard" in keys and not words and not card.get("standard"):
        words.append("non-standard")
    return [HASH.sub(r"\1...", word) for word in words]


def _apart(cards: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The entries that differ between the cards, as text."""
    differences = []
    keys = {key for card in cards.values() for key in card}
    unknown = {k for k in UNKNOWN_BEFORE if not all(k in card for card in cards.values())}
    for key in sorted(keys - unknown):
        groups: dict[str, list[str]] = {}
        for name, card in cards.items():
            value = json.dumps(canonical(card.get(key)), sort_keys=True, default=str)
            groups.setdefault(value, []).append(name)
        if len(groups) > 1:
            each = (f"{value} in {', '.join(names)}" for value, names in groups.items())
            differences.append(HASH.sub(r"\1...", f"{key} is {' and '.join(each)}"))
    return differences


def shown(figure: Figure) -> str:
    """A figure's value as displayed: accuracies as a percentage."""
    if not math.isfinite(figure.value):
        return "not finite"
    return f"{figure.value:.2%}" if is_share(figure) else f"{figure.value:.4g}"


def shown_interval(figure: Figure) -> str:
    """Its 95 % interval; empty where none is defined."""
    if figure.low is None or figure.high is None:
        return ""
    if is_share(figure):
        return f"{100 * figure.low:.2f} to {100 * figure.high:.2f} %"
    return f"{figure.low:.4g} to {figure.high:.4g}"


def is_share(figure: Figure) -> bool:
    return figure.low is not None and (figure.name == "clean" or "attack" in figure.protocol)


def _measured(figure: Figure) -> dict[str, Any]:
    """The entries of a card that determine the meaning of the figure."""
    card = {
        key: canonical(value)
        for key, value in flat(figure.protocol)
        if not NOT_PROTOCOL.intersection(key.split("."))
    }
    if "attack" not in card and stem_of(figure.name) in UNATTACKED:
        card = {key: value for key, value in card.items() if key not in ("norm", "radius_px")}
    return card


def stem_of(name: str) -> str:
    """auroc of auroc/svhn, fd of fd-alexnet, gap of gap_mean."""
    return name.replace("-", "/").replace("_", "/").split("/")[0]


def _columns(runs: Sequence[Judged], names: Sequence[str]) -> list[Column]:
    there = list(dict.fromkeys(figure.name for run in runs for figure in run.record.figures))
    if names:
        for name in names:
            if name not in there:
                known = ", ".join(sorted(there)) or "none at all"
                raise DataError(f"no run has a figure {name!r}; there are {known}")
        return [_column(name) for name in names]
    columns = []
    for column in COLUMNS:
        several = {"fid": ("fid", "fd-"), "auroc": ("auroc",)}.get(column.name)
        most = int(column.name == "auroc")  # the set; other scores are below the table
        kinds = [n for n in there if several and n.startswith(several) and n.count("/") <= most]
        columns += [_column(name) for name in kinds] or [column]
    return columns


def _column(name: str) -> Column:
    """The column of a figure; an unknown figure has no best."""
    known = next((c for c in COLUMNS if c.name == name), None)
    if known is not None:
        return known
    stem = stem_of(name)
    near = next((c for c in COLUMNS if c.name == {"fd": "fid"}.get(stem, stem)), None)
    title = name.replace("fd-", "FD, ").replace("auroc/", "AUROC, ") if near else name
    better = (stem in HIGHER) - (stem in LOWER)
    return Column(name, title, better, near.source if near else "", near.evaluator if near else "")


def _lines(column: Column, runs: Sequence[Judged]) -> list[Line]:
    """A line for each protocol of a figure; if there are several, the title names it."""
    rows = aligned(runs, column.name)
    having = [next((f for f in row if f), None) for row in rows]
    descriptions = distinguishing_settings([f for f in having if f]) if len(rows) > 1 else [""]
    lines = []
    for row, words in zip(rows, descriptions, strict=True):
        title = f"{column.title}, {words}" if words else column.title
        pairs = list(zip(runs, row, strict=True))
        why = ["" if figure else _why_missing(column, run) for run, figure in pairs]
        single = sum(map(bool, row)) == 1  # the others were measured otherwise: it says how
        beside = [f or (run.figure(column.name) if single else None) for run, f in pairs]
        differs = differing(runs, column.name, beside)
        lines.append(Line(column._replace(title=title), row, why, differs))
    return lines


def _why_missing(column: Column, run: Judged) -> str:
    if run.figure(column.name):
        return "measured otherwise"
    left_out = run.record.left_out.get(column.evaluator)
    if left_out:
        return f"left out: {left_out}"
    how = f"; `jemkit evaluate RUN {column.source}` measures it" if column.source else ""
    return f"not measured{how}"


def _names(paths: Sequence[Path]) -> list[str]:
    """The names of the folders, with as many parents as needed to distinguish them."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
