"""A run's folder: its config, events, metrics, checkpoints and pictures."""

import csv
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jemkit.errors import ConfigError, DataError
from jemkit.runtime.files import append_text, read_json, write_json, write_text


class RunFolder:
    """Where a run keeps everything; made new, or opened to go on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        cls.check_vacant(path)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder.checkpoints.mkdir()
        folder.samples.mkdir()
        return folder

    @staticmethod
    def check_vacant(path: Path) -> None:
        """Refuse a path that a new run cannot have."""
        if path.name == "latest":
            raise ConfigError(
                f"{path} is the link to the newest run beside it; choose another --out"
            )
        if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
            raise ConfigError(
                f"{path} exists already; go on with it by --resume, or choose another --out"
            )

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        if not (path / "config.json").exists():
            raise DataError(
                f"{path} is no run that could be resumed: it has no config.json; "
                "`jemkit train` begins one"
            )
        return cls(path)

    @property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")  # type: ignore[no-any-return]

    def write_config(self, recipe: dict[str, Any], origins: dict[str, str], **also: Any) -> None:
        about = {"recipe": recipe, "origins": origins, "versions": versions(), "git": git_state()}
        write_json(self.path / "config.json", {**about, **also})

    def event(self, kind: str, **what: Any) -> None:
        """Append one line to events.jsonl."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **what}, allow_nan=True)
        append_text(self.path / "events.jsonl", line + "\n")

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to metrics.csv; a column that is new is empty in the rows before."""
        path = self.path / "metrics.csv"
        before = _columns(path) if path.exists() else []
        columns = list(dict.fromkeys([*before, *(name for row in rows for name in row)]))
        if columns != before:
            write_text(path, _csv(columns, [*self.metrics(), *rows]))
            return
        append_text(path, _csv(columns, rows, header=False))

    def metrics(self) -> list[dict[str, str]]:
        path = self.path / "metrics.csv"
        if not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def drop_metrics_from(self, step: int) -> None:
        """Forget rows that a resumed run will write again."""
        rows = self.metrics()
        kept = [row for row in rows if int(row["step"]) < step]
        if len(kept) == len(rows):
            return
        write_text(self.path / "metrics.csv", _csv(list(rows[0]), kept))

    def link_latest(self, folder: Path) -> None:
        """Point `latest` in `folder` to the run."""
        folder.mkdir(parents=True, exist_ok=True)
        link, fresh = folder / "latest", folder / f".latest.{os.getpid()}"
        if link.exists() and not link.is_symlink():
            return  # somebody's own file of that name
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(os.path.relpath(self.path.resolve(), folder.resolve()))
        os.replace(fresh, link)


def versions() -> dict[str, str]:
    """What a figure depends on."""
    return {
        "jemkit": importlib.metadata.version("jemkit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def git_state() -> dict[str, Any] | None:
    """The commit of the folder that the run was started in, and whether it had changes."""
    try:
        head = _git("rev-parse", "HEAD")
        return {"commit": head, "dirty": bool(_git("status", "--porcelain"))} if head else None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, timeout=10, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _csv(columns: list[str], rows: Sequence[Mapping[str, Any]], *, header: bool = True) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _columns(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file))
