"""The commit that a run was started from, asked of git without running what its config names."""

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
"""Settings under which git starts no program: the folder's own config may come from anybody."""

ENVIRONMENT = {"GIT_OPTIONAL_LOCKS": "0", "GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1"}
"""Nothing is written, and no object of a partial clone is fetched."""

RUNS = (".clean", ".smudge", ".process")
"""What a filter driver may run while `git status` compares files."""


def git_state() -> dict[str, Any] | None:
    """The commit of the folder that the run was started in, and whether it had changes.

    `dirty` is None where that would take a filter program, which is not run, or git fails.
    """
    try:
        head = _git({}, "rev-parse", "--verify", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    if not head:
        return None
    try:
        return {"commit": head.decode("ascii", "replace"), "dirty": _dirty()}
    except (OSError, subprocess.SubprocessError):
        return {"commit": head.decode("ascii", "replace"), "dirty": None}


def _dirty() -> bool | None:
    listed = _git({}, "config", "--null", "--name-only", "--list")
    if listed is None:
        return None
    names = {os.fsdecode(name) for name in listed.split(b"\0")}
    filters = {n: "" for n in names if n.startswith("filter.") and n.lower().endswith(RUNS)}
    required = {f"{n.rpartition('.')[0]}.required": "false" for n in filters}
    changed = _git({**filters, **required}, "status", "--porcelain", "--ignore-submodules=all")
    if changed is None or (changed and filters):  # a file may differ as its filter left it
        return None
    return bool(changed)


def _git(settings: dict[str, str], *arguments: str) -> bytes | None:
    """What git prints, None where it fails."""
    given = {**NOTHING, **settings}
    own = os.environ.get("GIT_CONFIG_COUNT", "")
    first = int(own) if own.isdecimal() else 0  # after what the user's environment gives git
    passed = {**ENVIRONMENT, "GIT_CONFIG_COUNT": str(first + len(given))}
    for at, (key, value) in enumerate(given.items(), first):
        passed |= {f"GIT_CONFIG_KEY_{at}": key, f"GIT_CONFIG_VALUE_{at}": value}
    done = subprocess.run(
        ["git", "--no-pager", *arguments], stdin=subprocess.DEVNULL, capture_output=True,
        timeout=10, check=False, env={**os.environ, **passed},
    )  # fmt: skip
    return done.stdout.strip(b"\n") if done.returncode == 0 else None
