"""Runs a command in its own process group, with a time limit."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

TAIL = 4000
"""Characters of a command's output that a record keeps."""


class Outcome(NamedTuple):
    """How a command ended."""

    status: str  # passed, failed or timeout
    seconds: float
    output: str  # the last characters of what it printed
    code: int | None  # None where it was killed at its limit

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def python(*arguments: str | Path) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, "-W", "ignore::DeprecationWarning", *map(str, arguments)]


def run(
    command: Sequence[str],
    limit: float,
    *,
    cwd: Path | None = None,
    grace: float = 0.0,
    log: Path | None = None,
) -> Outcome:
    """Run a command for at most `limit` seconds; then it and all that it started are killed.

    With `grace` it is first asked to end by SIGTERM, and has that many seconds more. `log` is where
    its whole output is kept.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() if log is None else log.open("w+b") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            cwd=cwd, start_new_session=True,
        )  # fmt: skip
        try:
            code = _wait(process, limit, grace)
        finally:
            _kill(process)
        seconds = time.monotonic() - began
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - TAIL))
        text = output.read().decode(errors="replace")
    status = "timeout" if code is None else "passed" if code == 0 else "failed"
    return Outcome(status, round(seconds, 2), text, code)


def _wait(process: subprocess.Popen[bytes], limit: float, grace: float) -> int | None:
    """The exit code; None where the limit came first."""
    try:
        return process.wait(max(limit, 0.0))
    except subprocess.TimeoutExpired:
        if not grace:
            return None
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.wait(grace)
    except subprocess.TimeoutExpired:
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its descendants, those in sessions of their own too."""
    for pid in [*descendants(process.pid), process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that these started, by /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    children_of = list(children.get(pid, []))
    for child in children_of:
        children_of += children.get(child, [])
    return children_of
