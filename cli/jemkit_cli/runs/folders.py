"""Finds the run folders below a folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from jemkit.runtime.latest import NAME as LATEST

DEPTH = 4
"""Levels of folders that are searched: runs of a study are in a folder of their own."""
REMOVED = ".removed"
"""How the name of a folder ends that `jemkit rm` is deleting."""


def find(folder: Path) -> list[Path]:
    """The runs below a folder, or the folder itself; links to runs elsewhere are included."""
    runs = [folder] if is_run(folder) else [*_below(folder, DEPTH)]
    paths = {path.resolve(): path for path in sorted(runs, key=lambda path: path.is_symlink())}
    return sorted(set(runs) & set(paths.values()))


def is_run(path: Path) -> bool:
    """Whether a folder has the files of a run; they may be damaged."""
    if (path / "model.safetensors").exists():  # an exported model, or a checkpoint
        return False
    logged = (path / "events.jsonl").exists() or (path / "metrics.csv").exists()
    if (path / "checkpoints").is_dir():
        return logged or (path / "config.json").exists()
    return logged and (path / "config.json").exists()


def leftovers(folder: Path) -> list[Path]:
    """What an interrupted `jemkit rm` did not delete, in a folder of runs."""
    paths = (path for level in ("", "*/") for path in folder.glob(f"{level}.*{REMOVED}"))
    return sorted(path for path in paths if path.is_dir())


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # of another user, or gone
        return
    for entry in entries:
        if entry.name.startswith(".") or not entry.is_dir() or entry.name == LATEST:
            continue
        path = folder / entry.name
        if is_run(path):
            yield path
        elif depth > 1 and not entry.is_symlink():
            yield from _below(path, depth - 1)
