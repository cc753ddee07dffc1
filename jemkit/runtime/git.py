"""The commit at the start of a run, read from git without executing anything in its config."""

import os
import subprocess
from typing import Any

NOTHING = {
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "status.submoduleSummary": "false",
    "status.renames": "false",
    "safe.bareRepository": "explicit",
}
"""Options under which git starts no program: the folder's config may be untrusted."""

ENVIRONMENT = {"GIT_OPTIONAL_LOCKS": "0", "GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1"}
"""Writes nothing, and fetches no object of a partial clone."""

RUNS = (".clean", ".smudge", ".process")
"""The filter commands that `git status` may execute to compare files."""


def git_state() -> dict[str, Any] | None:
    """The commit of the folder in which the run was started, and whether it had changes.

    `dirty` is None if that would execute a filter, or if git fails.
    """
    head = _git({}, "rev-parse", "--verify", "HEAD")
    return {"commit": head.decode("ascii", "replace"), "dirty": _dirty()} if head else None


def _dirty() -> bool | None:
    listed = _git({}, "config", "--null", "--name-only", "--list")
    if listed is None:
        return None
    names = {os.fsdecode(name) for name in listed.split(b"\0")}
    filters = {n: "" for n in names if n.startswith("filter.") and n.lower().endswith(RUNS)}
    required = {f"{n.rpartition('.')[0]}.required": "false" for n in filters}
    changed = _git({**filters, **required}, "status", "--porcelain", "--ignore-submodules=all")
    if changed is None or (changed and filters):  # a file may differ only by its filter
        return None
    return bool(changed)


def _git(settings: dict[str, str], *arguments: str) -> bytes | None:
    """The output of git, None if it fails."""
    given = {**NOTHING, **settings}
    own = os.environ.get("GIT_CONFIG_COUNT", "")
    first = int(own) if own.isdecimal() else 0  # after the user's environment variables for git
    passed = {**ENVIRONMENT, "GIT_CONFIG_COUNT": str(first + len(given))}
    for at, (key, value) in enumerate(given.items(), first):
        passed |= {f"GIT_CONFIG_KEY_{at}": key, f"GIT_CONFIG_VALUE_{at}": value}
    try:
        done = subprocess.run(
            ["git", "--no-pager", *arguments], stdin=subprocess.DEVNULL, capture_output=True,
            timeout=10, check=False, env={**os.environ, **passed},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip(b"\n") if done.returncode == 0 else None
