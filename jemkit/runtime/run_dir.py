"""A run's folder: config, events, metrics, checkpoints and pictures."""

import csv
import importlib.metadata
import io
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from jemkit.errors import ConfigError, DataError
from jemkit.runtime.files import (
    append_text,
    read_json,
    set_aside,
    write_bytes,
    write_json,
    write_text,
)
from jemkit.runtime.git import git_state
from jemkit.runtime.lock import LOCK
from jemkit.runtime.opening import LOG_LIMIT, make_folder, read_file, refuse_links

log = logging.getLogger(__name__)

T = TypeVar("T")

LOGS = METRICS, EVENTS = "metrics.csv", "events.jsonl"
"""The logs to which a run appends."""

TRACKERS = "trackers"  # what trackers keep, a file each
FOLDERS = "checkpoints", "samples", TRACKERS, "tensorboard", "wandb"


class RunFolder:
    """The folder of a run; created, or opened to resume."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self._columns: list[str] | None = None  # of metrics.csv, once they are known

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        cls.check_vacant(path)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        make_folder(folder.checkpoints)
        make_folder(folder.samples)
        return folder

    @staticmethod
    def check_vacant(path: Path) -> None:
        if path.name == "latest":
            what = "the link to the newest run beside it"
            raise ConfigError(f"{path} is {what}; choose another --out")
        if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
            raise ConfigError(
                f"{path} already exists; continue it with --resume, or choose another --out"
            )

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        if not (path / "config.json").exists():
            raise DataError(
                f"{path} is not a run that can be resumed: it has no config.json; `jemkit train` "
                "starts one"
            )
        cls.check_links(path)
        return cls(path)

    @staticmethod
    def check_links(path: Path) -> None:
        """Reject a run that would be written through links to files elsewhere."""
        refuse_links(path, (LOCK, *LOGS, *FOLDERS))

    @property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")  # type: ignore[no-any-return]

    def write_config(self, recipe: dict[str, Any], origins: dict[str, str], **also: Any) -> None:
        about = {"recipe": recipe, "origins": origins, "versions": versions(), "git": git_state()}
        write_json(self.path / "config.json", {**about, **also})

    def event(self, kind: str, **what: Any) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **what}, allow_nan=True)
        append_text(self.path / EVENTS, line + "\n")

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to metrics.csv; a new column is empty in earlier rows."""
        path = self.path / METRICS
        if self._columns is None or not path.exists():
            self._columns = [*next(iter(self.metrics()), {})]
        columns = list(dict.fromkeys([*self._columns, *(name for row in rows for name in row)]))
        if columns != self._columns:
            write_text(path, _csv(columns, [*self.metrics(), *rows]))
            self._columns = columns
        else:
            append_text(path, _csv(columns, rows, header=False))

    def metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv; a damaged file is renamed, as a run can continue without."""
        return self._mended(METRICS, metric_rows)

    def mend_logs(self) -> None:
        """Cut half a line that a kill left at the end of a log; rename a damaged log."""
        self._mended(EVENTS, event_lines)
        self._mended(METRICS, metric_rows)

    def _mended(self, name: str, read: Callable[[bytes], list[T]]) -> list[T]:
        path = self.path / name
        try:
            content = read_file(path, LOG_LIMIT)
            whole = content[: content.rfind(b"\n") + 1]
            if content and not whole:
                raise DataError("it has no whole line")
            lines = read(whole)
        except FileNotFoundError:
            return []
        except (DataError, OSError) as error:
            aside = set_aside(path).name
            message = f"{path} is damaged: {error}; it is kept as {aside}, and a new one is started"
            log.warning("%s", message)
            self.event("damaged", message=message)
            return []
        if whole != content:
            write_bytes(path, whole)
        return lines

    def drop_metrics_from(self, step: int) -> None:
        """Drop rows that a resumed run will write again."""
        rows = self.metrics()
        earlier = [row for row in rows if int(row["step"]) < step]
        if len(earlier) < len(rows):
            write_text(self.path / METRICS, _csv(list(rows[0]), earlier))


def versions() -> dict[str, str]:
    """Versions on which a figure depends."""
    return {
        "jemkit": importlib.metadata.version("jemkit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _csv(columns: list[str], rows: Sequence[Mapping[str, Any]], *, header: bool = True) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def metric_rows(content: bytes) -> list[dict[str, str]]:
    """The rows of metrics.csv, or a DataError that says where it is damaged.

    The column step has increasing whole numbers, and every row has as many cells as the header.
    """
    reader = csv.DictReader(io.StringIO(_text(content), newline=""), strict=True)
    rows: list[dict[str, str]] = []
    before = -1
    try:
        columns = list(reader.fieldnames or ())
        if content and ("step" not in columns or len({*columns}) < len(columns)):
            raise DataError("its first line is not a header with a column step")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"line {reader.line_num} has not as many cells as the header")
            step = row["step"]
            if not (step.isdecimal() and len(step) < 19 and int(step) > before):
                raise DataError(
                    f"line {reader.line_num} has the step {step[:40]!r} after step {before}; "
                    "expected a larger whole number"
                )
            rows.append(row)
            before = int(step)
    except csv.Error as error:
        raise DataError(f"line {reader.line_num}: {error}") from None
    return rows


def event_lines(content: bytes) -> list[dict[str, Any]]:
    """The events of events.jsonl, or a DataError that says where it is damaged."""
    events = []
    for number, line in enumerate(_text(content).split("\n")[:-1], 1):
        try:
            event = json.loads(line)
            if not isinstance(event["event"], str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"line {number} is not an event") from None
        events.append(event)
    return events


def _text(content: bytes) -> str:
    if b"\0" in content:
        raise DataError("it contains NUL bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"it is not text in UTF-8 ({error})") from None
