"""A run's logs, metrics.csv and events.jsonl, which are checked before a run resumes."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jemkit.errors import DataError
from jemkit.runtime.files import drop_torn_line
from jemkit.runtime.opening import LOG_LIMIT, opened, read_file

Row = dict[str, str]


def metric_rows(content: bytes) -> list[Row]:
    """The rows of metrics.csv, or a DataError that says where it is damaged.

    The column step has increasing whole numbers, and every row has as many cells as the header.
    """
    reader = csv.reader(io.StringIO(_text(content), newline=""), strict=True)
    rows: list[Row] = []
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
    _check_steps([row["step"] for row in rows])
    return rows


def _check_steps(steps: list[str]) -> None:
    before = -1
    for number, step in enumerate(steps, 1):
        if not (step.isascii() and step.isdecimal() and len(step) < 19):
            raise DataError(f"row {number} has the step {step[:40]!r}, not a whole number")
        if int(step) <= before:
            raise DataError(f"row {number} has step {step} after step {before}")
        before = int(step)


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


def fault_of(path: Path, read: Callable[[bytes], object]) -> str:
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


def columns(path: Path) -> list[str]:
    """The columns of a metrics.csv, from its first line; none if that is not a header."""
    try:
        with opened(path) as file:
            header = next(csv.reader([_text(file.readline(LOG_LIMIT))], strict=True), [])
    except (FileNotFoundError, DataError, csv.Error):
        return []
    return header if "step" in header else []
