"""The link `latest` of a folder of runs, which points to the newest one."""

import os
from pathlib import Path

NAME = "latest"


def link_latest(folder: Path, run: Path) -> None:
    """Let the link `latest` in `folder` point to a run; a user's own file of that name stays."""
    folder.mkdir(parents=True, exist_ok=True)
    link, fresh = folder / NAME, folder / f".{NAME}.{os.getpid()}"
    if link.exists() and not link.is_symlink():
        return
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(run.resolve(), folder.resolve()))
    os.replace(fresh, link)
