"""`jemkit rm`: delete runs, or only their checkpoints."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer

from jemkit_cli.printable import printable
from jemkit_cli.runs.listing import RUNS
from jemkit_cli.terminal import guarded, say

WEIGHTS = "checkpoints"


@guarded
def rm(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN")],
    checkpoints: Annotated[
        bool,
        typer.Option("--checkpoints", help="Delete only the checkpoints; figures and logs stay."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Delete runs; what is no run, or is being trained or evaluated, is refused."""
    from jemkit.runtime.disk import readable, used_bytes

    paths = _checked(runs, weights=checkpoints)
    with ExitStack() as held:
        for path in paths:
            _lock(path, held)
        places = [path / WEIGHTS if checkpoints else path for path in paths]
        places = [place for place in places if place.exists()]
        sizes = [used_bytes(place) for place in places]
        if places:
            _confirm(places, sum(sizes), yes)
        for place in places:
            _delete(place)
    links = [] if checkpoints else [*_relink(paths)]
    if as_json:
        rows = [{"path": str(place), "bytes": n} for place, n in zip(places, sizes, strict=True)]
        print(json.dumps({"deleted": rows, "bytes": sum(sizes), "latest": links}), flush=True)
        return
    for place, size in zip(places, sizes, strict=True):
        say(f"deleted {place}, {readable(size)}")
    for link in links:
        say(f"{link['link']} is now {link['run'] or 'deleted: no run is left'}")
    say(f"freed {readable(sum(sizes))}")


def _checked(runs: Sequence[Path], *, weights: bool) -> list[Path]:
    """The real folders of the runs, each once; raises before anything is deleted."""
    from jemkit.errors import DataError
    from jemkit.runtime.opening import refuse_link
    from jemkit_cli.runs.folders import find

    paths = []
    for run in runs:
        if not run.exists():
            raise DataError(f"{run} does not exist; `jemkit ls` lists the runs")
        path = run.resolve()
        if run.is_symlink() and run.parent.resolve() not in path.parents:
            raise DataError(
                f"{run} is a link to {path}, outside of its folder; name {path} to delete it"
            )
        if not _is_ours(path):
            raise DataError(
                f"{run} is not a run of `jemkit train`, which has config.json, events.jsonl and "
                "checkpoints; nothing is deleted"
            )
        inner = [p for child in path.iterdir() if child.is_dir() for p in find(child)]
        if inner:
            raise DataError(f"{run} has another run in it, {inner[0]}; nothing is deleted")
        if weights:
            refuse_link(path / WEIGHTS)
        paths.append(path)
    return list(dict.fromkeys(paths))


def _is_ours(path: Path) -> bool:
    """Whether a folder is a run; if its config.json is damaged, a checkpoint of ours shows it."""
    from jemkit.errors import DataError
    from jemkit_cli.runs.folders import REMOVED, is_run
    from jemkit_cli.runs.summary import read_recipe

    if not path.is_dir() or not is_run(path):
        return path.is_dir() and path.name.startswith(".") and path.name.endswith(REMOVED)
    try:
        return bool(read_recipe(path))
    except DataError:
        logged = (path / "events.jsonl").exists()
        return logged and any(path.glob(f"{WEIGHTS}/*/manifest.json"))


def _lock(path: Path, held: ExitStack) -> None:
    """Hold the locks of training and evaluation in a run, or raise."""
    from jemkit.runtime.lock import EVALUATION_LOCK, LOCK, in_use, locked

    held.enter_context(in_use(path, alone=True))
    for name in (LOCK, EVALUATION_LOCK):
        held.enter_context(locked(path / name, f"deletes in {path}"))


def _confirm(places: Sequence[Path], size: int, yes: bool) -> None:
    from jemkit.runtime.disk import readable

    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("this is not a terminal, and nothing was deleted; pass --yes")
    for place in places:
        typer.echo(printable(str(place)), err=True)
    typer.confirm(f"Delete with everything in it, {readable(size)}?", abort=True, err=True)


def _delete(place: Path) -> None:
    """Delete a folder under another name, so that half of a run never looks like one.

    Links in it are deleted, not what they point to.
    """
    from jemkit_cli.runs.folders import REMOVED

    if not place.name.endswith(REMOVED):
        there = {path.name for path in place.parent.iterdir()}
        names = (f".{place.name}{f'-{i}' if i else ''}{REMOVED}" for i in range(len(there) + 1))
        aside = place.with_name(next(name for name in names if name not in there))
        os.rename(place, aside)
        place = aside
    shutil.rmtree(place)


def _relink(paths: Sequence[Path]) -> Iterator[dict[str, str | None]]:
    """Let each link `latest` that pointed to a deleted run point to the newest one left."""
    from jemkit.runtime.latest import NAME, link_latest
    from jemkit_cli.runs.folders import DEPTH

    folders = [parent for path in paths for parent in list(path.parents)[:DEPTH]]
    for folder in dict.fromkeys([*folders, RUNS.resolve()]):
        link = folder / NAME
        if not link.is_symlink() or Path(os.path.realpath(link)) not in paths:
            continue
        newest = _newest(folder)
        if newest is None:
            link.unlink()
        else:
            link_latest(folder, newest)
        yield {"link": str(link), "run": None if newest is None else str(newest)}


def _newest(folder: Path) -> Path | None:
    """The run that was started last, of those that can be read."""
    from jemkit.errors import DataError
    from jemkit_cli.runs.folders import find
    from jemkit_cli.runs.summary import read

    begun = {}
    for path in find(folder):
        with suppress(DataError, OSError):
            begun[path] = read(path, path.name).started
    return max(begun, key=lambda path: begun[path], default=None)
