"""What the files of a run say about it: parts, progress, state, figures, size."""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jemkit.errors import DataError
from jemkit.runtime.disk import used_bytes
from jemkit.runtime.lock import LOCK, is_locked
from jemkit.runtime.opening import JSON_LIMIT, LOG_LIMIT, decoded, read_file

FIGURES = {"clean": r"clean", "pgd": r"pgd\d*", "aa": r"aa", "fid": r"fid|fd-.*"}
"""The figures of a summary, with the names that they have in a record."""
ENDS = {"end": "finished", "diverged": "diverged"}
BEGINS = ("start", "resume")
STATES = ("running", "finished", "diverged", "interrupted")
ABSENT = object()
"""A setting that a recipe does not have; one that is unset is None."""
LAST_TIME = 2.5e11
"""Seconds since 1970 until the year 9892; a larger number is no time."""


class Value(NamedTuple):
    """A figure of a record; the value is None if it is not finite."""

    name: str
    value: float | None
    standard: bool


@dataclass(frozen=True)
class Summary:
    """A run, as its files describe it."""

    name: str
    path: Path
    recipe: dict[str, Any]
    state: str
    done: int  # epochs
    started: float  # seconds since 1970
    size: int  # bytes
    figures: dict[str, Value]
    faults: list[str] = field(default_factory=list)  # its damaged files

    def setting(self, key: str, absent: Any = None) -> Any:
        """An option of the recipe by its dotted name; `absent` if there is none."""
        value: Any = self.recipe
        for name in key.split("."):
            value = value.get(name, absent) if isinstance(value, Mapping) else absent
        return value

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.name,
            "path": str(self.path),
            "backbone": _scalar(self.setting("backbone.use")),
            "objective": _scalar(self.setting("objective.use")),
            "dataset": _scalar(self.setting("data.use")),
            "seed": _scalar(self.setting("run.seed")),
            "epochs_done": self.done,
            "epochs": _scalar(self.setting("run.epochs")),
            "state": self.state,
            "figures": {kind: value._asdict() for kind, value in self.figures.items()},
            "bytes": self.size,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.started)),
            "damaged": self.faults,
        }


def read(path: Path, name: str) -> Summary:
    """The summary of a run; DataError if its config.json is damaged.

    Other damaged files are listed in `faults`.
    """
    recipe = read_recipe(path)
    faults: list[str] = []
    events = _events(path / "events.jsonl", faults)
    ended = _end(events)
    running = ended not in ENDS.values() and is_locked(path / LOCK)
    figures = _figures(path / "evaluation.json", faults)
    if not figures:
        figures = next((e.get("figures") for e in reversed(events) if e["event"] == "end"), [])
    times = (_number(event.get("time")) for event in events)
    began = next((t for t in times if t is not None and 0 <= t <= LAST_TIME), None)
    return Summary(
        name, path, recipe, "running" if running else ended, _epochs_done(events),
        (path / "config.json").stat().st_mtime if began is None else began,
        used_bytes(path), _by_kind(figures), faults,
    )  # fmt: skip


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a run's config.json; DataError if that is damaged or of something else."""
    config = _json(path / "config.json")
    recipe = config.get("recipe") if isinstance(config, dict) else None
    if not isinstance(recipe, dict):
        raise DataError(f"{path / 'config.json'} has no recipe of a run")
    return recipe


def _json(path: Path) -> Any:
    try:
        return json.loads(decoded(read_file(path, JSON_LIMIT)))
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        message = error if isinstance(error, DataError) else f"{path} is no JSON: {error}"
        raise DataError(str(message)) from None


def _events(path: Path, faults: list[str]) -> list[dict[str, Any]]:
    """The events of a run; a line that a kill cut off is skipped."""
    try:
        content = read_file(path, LOG_LIMIT).decode(errors="replace")
    except FileNotFoundError:
        return []
    except (DataError, OSError) as error:
        faults.append(str(error))
        return []
    events = []
    for line in content.split("\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
    if content.strip() and not events:
        faults.append(f"{path} has no event")
    return events


def _end(events: list[dict[str, Any]]) -> str:
    """The state of a run that no process trains."""
    for event in reversed(events):
        if event["event"] in ENDS:
            return ENDS[event["event"]]
        if event["event"] in BEGINS:
            break
    return "interrupted"


def _epochs_done(events: list[dict[str, Any]]) -> int:
    """The last epoch that was not rolled back, nor is trained again after a resume."""
    limit = math.inf
    for event in reversed(events):
        step = event.get("to" if event["event"] == "rollback" else "step")
        if not isinstance(step, int):
            continue
        if event["event"] == "epoch" and step <= limit and isinstance(event.get("epoch"), int):
            return int(event["epoch"])
        if event["event"] in ("rollback", "resume"):
            limit = min(limit, step)
    return 0


def _figures(path: Path, faults: list[str]) -> list[Any]:
    """The figures of a run's record; none if it was not evaluated."""
    if not path.exists():
        return []
    try:
        record = _json(path)
        figures = record["figures"]
    except (DataError, KeyError, TypeError) as error:
        known = isinstance(error, DataError)
        faults.append(str(error) if known else f"{path} has no figures")
        return []
    return figures if isinstance(figures, list) else []


def _by_kind(figures: Any) -> dict[str, Value]:
    """One figure of each kind: the first with the standard protocol, else the first."""
    values = list(_values(figures))
    by_kind = {}
    for kind, pattern in FIGURES.items():
        named = [value for value in values if re.fullmatch(pattern, value.name)]
        named.sort(key=lambda value: not value.standard)
        if named:
            by_kind[kind] = named[0]
    return by_kind


def _values(figures: Any) -> Iterator[Value]:
    for figure in figures if isinstance(figures, list) else []:
        if isinstance(figure, dict) and isinstance(figure.get("name"), str):
            protocol = figure.get("protocol")
            standard = isinstance(protocol, dict) and protocol.get("standard") is True
            yield Value(figure["name"], _number(figure.get("value")), standard)


def _number(value: Any) -> float | None:
    """A finite number; None if it is none."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer of more than 308 digits
        return None
    return number if math.isfinite(number) else None


def _scalar(value: Any) -> Any:
    """A setting as JSON; None if it is neither a name nor a finite number."""
    return value if isinstance(value, str | int) else _number(value)
