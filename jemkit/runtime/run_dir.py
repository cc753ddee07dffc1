"""A run's folder: config, events, metrics, checkpoints and pictures."""

import csv
import importlib.metadata
import io
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jemkit.errors import ConfigError, DataError
from jemkit.runtime.files import (
    append_text,
    drop_torn_line,
    read_json,
    set_aside,
    write_json,
    write_text,
)
from jemkit.runtime.git import git_state
from jemkit.runtime.lock import LOCK
from jemkit.runtime.opening import LOG_LIMIT, make_folder, opened, read_file, refuse_links

log = logging.getLogger(__name__)

LOGS = METRICS, EVENTS = "metrics.csv", "events.jsonl"
"""The logs to which a run appends."""


class RunFolder:
    """The folder of a run; created, or opened to resume."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

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
        refuse_links(path, (LOCK, *LOGS, "checkpoints", "samples", "tensorboard"))

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
        before = _columns(path)
        columns = list(dict.fromkeys([*before, *(name for row in rows for name in row)]))
        if columns != before:
            write_text(path, _csv(columns, [*self.sound_metrics(), *rows]))
        else:
            append_text(path, _csv(columns, rows, header=False))

    def metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv; a DataError where it is damaged."""
        path = self.path / METRICS
        try:
            return metric_rows(read_file(path, LOG_LIMIT)) if path.exists() else []
        except DataError as error:
            raise DataError(f"{path} is damaged: {error}") from None

    def sound_metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv; a damaged file is renamed, as a run can continue without."""
        try:
            return self.metrics()
        except DataError as error:
            self._set_aside(METRICS, str(error))
            return []

    def mend_logs(self) -> None:
        """Cut half a line that a kill left at the end of a log; rename a damaged log."""
        for name, read in ((EVENTS, event_lines), (METRICS, metric_rows)):
            if fault := _fault_of(self.path / name, read):
                self._set_aside(name, f"{self.path / name} is damaged: {fault}")

    def _set_aside(self, name: str, fault: str) -> None:
        aside = set_aside(self.path / name).name
        message = f"{fault}; it is kept as {aside}, and a new one is started"
        log.warning("%s", message)
        self.event("damaged", message=message)

    def drop_metrics_from(self, step: int) -> None:
        """Drop rows that a resumed run will write again."""
        rows = self.sound_metrics()
        earlier = [row for row in rows if int(row["step"]) < step]
        if len(earlier) < len(rows):
            write_text(self.path / METRICS, _csv(list(rows[0]), earlier))

    def link_latest(self, folder: Path) -> None:
        """Let the link `latest` in `folder` point to the run."""
        folder.mkdir(parents=True, exist_ok=True)
        link, fresh = folder / "latest", folder / f".latest.{os.getpid()}"
        if link.exists() and not link.is_symlink():
            return  # a user's own file of that name
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(os.path.relpath(self.path.resolve(), folder.resolve()))
        os.replace(fresh, link)


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
    reader = csv.reader(io.StringIO(_text(content), newline=""), strict=True)
    rows: list[dict[str, str]] = []
    try:
        header = next(reader, [])
        if "step" not in header or len(set(header)) != len(header):
            raise DataError("its first line is not a header with a column step")
        for cells in reader:
            if len(cells) != len(header):
                raise DataError(
                    f"line {reader.line_num} has {len(cells)} cells instead of {len(header)}"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"line {reader.line_num}: {error}") from None
    before = -1
    for number, step in enumerate((row["step"] for row in rows), 1):
        if not (step.isascii() and step.isdecimal() and len(step) < 19):
            raise DataError(f"row {number} has the step {step[:40]!r}, not a whole number")
        if int(step) <= before:
            raise DataError(f"row {number} has step {step} after step {before}")
        before = int(step)
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


def _fault_of(path: Path, read: Callable[[bytes], object]) -> str:
    """What is wrong with a log, "" if nothing is; half a line left by a kill is cut off."""
    try:
        content = read_file(path, LOG_LIMIT)
        whole = content[: content.rfind(b"\n") + 1]
        read(whole)
        if not whole:
            _text(content)
    except FileNotFoundError:
        return ""
    except (DataError, OSError) as error:
        return str(error)
    drop_torn_line(path)
    return ""


def _columns(path: Path) -> list[str]:
    """The columns of a metrics.csv, from its first line; none if that is not a header."""
    try:
        with opened(path) as file:
            header = next(csv.reader([_text(file.readline(LOG_LIMIT))], strict=True), [])
    except (FileNotFoundError, DataError, csv.Error):
        return []
    return header if "step" in header else []
