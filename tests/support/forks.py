"""The command in forks of the server of `ranks`: processes of their own, without the imports."""

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cli_tools import Outcome, jemkit
from ranks import FORKING, ready
from waiting import until

from jemkit.runtime import distributed
from jemkit.runtime.work_cache import Shard

Prepare = Callable[[], None]


def nothing() -> None:
    """What a process does before the command."""


def forked(*arguments: str, cwd: Path, site: Path | None = None) -> Outcome:
    """The command in one process, whose path has the folder `site`."""
    (outcome,) = commands(*arguments, cwd=cwd, size=1, site=site)
    return outcome


def commands(
    *arguments: str,
    cwd: Path,
    size: int = 2,
    site: Path | None = None,
    prepare: Prepare = nothing,
) -> list[Outcome]:
    """The command in `size` processes of one group, each after `prepare()`."""
    with tempfile.TemporaryDirectory() as name:
        ready()
        running = [
            FORKING.Process(
                target=_command,
                args=(Path(name), Shard(rank, size), cwd, site, prepare, arguments),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in running:
            process.start()
        until(lambda: all(process.exitcode is not None for process in running), "the commands")
        assert [process.exitcode for process in running] == [0] * size
        records = [(Path(name) / f"{rank}.json").read_text() for rank in range(size)]
        return [Outcome(*json.loads(record)) for record in records]


def _command(
    folder: Path, me: Shard, cwd: Path, site: Path | None, prepare: Prepare, arguments: Any
) -> None:
    os.chdir(cwd)
    if site is not None:
        sys.path.append(str(site))
        importlib.invalidate_caches()
    if me.size > 1:
        os.environ.update(RANK=str(me.rank), WORLD_SIZE=str(me.size))
        init = f"file://{folder}/meeting"
        distributed.group = partial(distributed.group, init=init, shard=me)  # type: ignore[assignment]
    prepare()
    outcome = jemkit(*arguments)
    (folder / f"{me.rank}.json").write_text(json.dumps(outcome))
