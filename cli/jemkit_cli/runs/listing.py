"""`jemkit ls`: the runs of a folder with their settings, state and figures."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jemkit_cli.terminal import guarded, say

if TYPE_CHECKING:
    from jemkit_cli.runs.summary import Summary, Value

RUNS = Path("runs")
SORTS: dict[str, Callable[["Summary"], Any]] = {
    "date": lambda run: run.started,
    "name": lambda run: run.name,
    "state": lambda run: run.state,
    "epochs": lambda run: run.done,
    "size": lambda run: -run.size,
    "clean": lambda run: _best(run, "clean", -1),
    "pgd": lambda run: _best(run, "pgd", -1),
    "aa": lambda run: _best(run, "aa", -1),
    "fid": lambda run: _best(run, "fid", 1),
}
"""The orders of the list: the oldest, the largest, the best of a figure first."""


def _filter(option: str, text: str) -> Any:
    return typer.Option(option, help=text, metavar="NAME", show_default=False)


@guarded
def ls(
    folder: Annotated[
        Path, typer.Argument(help="A folder of runs, or a run.", metavar="[FOLDER]")
    ] = RUNS,
    backbone: Annotated[str | None, _filter("--backbone", "Only runs of this backbone.")] = None,
    objective: Annotated[str | None, _filter("--objective", "Only runs of this objective.")] = None,
    dataset: Annotated[str | None, _filter("--dataset", "Only runs on this data set.")] = None,
    state: Annotated[
        str | None, _filter("--state", "Only running, finished, diverged or interrupted runs.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", help="Only runs with this setting, e.g. run.seed=1; repeatable.",
                     metavar="K=V", show_default=False),
    ] = None,
    sort: Annotated[
        str, typer.Option(help=f"{', '.join(SORTS)}: the oldest, largest or best first.")
    ] = "date",
    reverse: Annotated[bool, typer.Option("--reverse", help="Reverse the order.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:  # fmt: skip
    """List the runs of a folder: parts, epochs, state, figures, size and date."""
    from jemkit_cli.runs.folders import leftovers
    from jemkit_cli.runs.summary import ABSENT, STATES

    _check(state, STATES, "--state")
    _check(sort, tuple(SORTS), "--sort")
    wanted = _wanted({"backbone.use": backbone, "objective.use": objective, "data.use": dataset},
                     where or ())  # fmt: skip
    runs, damaged = _read(folder)
    _check_keys([key for key, _ in wanted], runs)
    selected = [run for run in runs
                if all(_matches(run.setting(k, ABSENT), v) for k, v in wanted)]  # fmt: skip
    selected = [run for run in selected if state in (None, run.state)]
    selected.sort(key=lambda run: (run.started, run.name))
    selected.sort(key=SORTS[sort], reverse=reverse)
    if as_json:
        rows = [run.to_json() for run in selected]
        bad = [{"path": str(path), "reason": reason} for path, reason in damaged]
        print(json.dumps({"runs": rows, "damaged": bad}, allow_nan=False), flush=True)
        return
    _show(selected, len(runs), folder)
    for reason in [reason for _, reason in damaged] + [f for run in selected for f in run.faults]:
        say(f"damaged: {reason}")
    for path in leftovers(folder):
        say(f"{path} is what an interrupted `jemkit rm` left; `jemkit rm {path}` deletes it")


def _read(folder: Path) -> tuple[list["Summary"], list[tuple[Path, str]]]:
    """The runs below a folder, and those that cannot be read, with the reason."""
    from jemkit.errors import DataError
    from jemkit_cli.runs.folders import find
    from jemkit_cli.runs.summary import read

    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; pass a folder of runs, or train a run first")
    runs, damaged = [], []
    for path in find(folder):
        name = folder.resolve().name if path == folder else str(path.relative_to(folder))
        try:
            runs.append(read(path, name))
        except (DataError, OSError) as error:
            damaged.append((path, str(error)))
    return runs, damaged


def _show(runs: Sequence["Summary"], there: int, folder: Path) -> None:
    from jemkit.runtime.disk import readable

    if not runs:
        say(f"none of {_counted(there)} in {folder} matches" if there else f"no run in {folder}")
        return
    heads = ["run", "backbone", "objective", "data", "epochs", "state",
             "clean", "PGD", "AA", "FID", "size", "date"]  # fmt: skip
    for line in _aligned([heads, *(_row(run) for run in runs)]):
        say(line)
    if any(not value.standard for run in runs for value in run.figures.values()):
        say("~ non-standard protocol; `jemkit compare` shows protocols and intervals")
    size = readable(sum(run.size for run in runs))
    say(f"{'' if len(runs) == there else f'{len(runs)} of '}{_counted(there)}, {size}")


def _counted(runs: int) -> str:
    return f"{runs} run{'' if runs == 1 else 's'}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns, whole whatever the width of the terminal: names are copied from them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pairs = (zip(row, widths, strict=True) for row in rows)
    return ["  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in pairs]


def _row(run: "Summary") -> list[str]:
    from jemkit.runtime.disk import readable

    parts = [run.setting(f"{table}.use") for table in ("backbone", "objective", "data")]
    epochs = f"{run.done}/{run.setting('run.epochs')}"
    figures = [_shown(kind, run.figures.get(kind)) for kind in ("clean", "pgd", "aa", "fid")]
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started))
    return [run.name, *map(str, parts), epochs, run.state, *figures, readable(run.size), date]


def _shown(kind: str, value: "Value | None") -> str:
    if value is None:
        return "-"
    if value.value is None:
        return "not finite"
    text = f"{value.value:.4g}" if kind == "fid" else f"{value.value:.2%}"
    text += f" {value.name}" if kind == "fid" and value.name != "fid" else ""
    return text if value.standard else f"{text} ~"


def _best(run: "Summary", kind: str, sign: int) -> tuple[bool, float]:
    """A key that sorts the best figure first, and missing ones last."""
    figure = run.figures.get(kind)
    value = None if figure is None else figure.value
    return (True, 0.0) if value is None else (False, sign * value)


def _wanted(named: dict[str, str | None], where: Sequence[str]) -> list[tuple[str, str]]:
    """Keys of a recipe, each with the value that a run must have."""
    wanted = [(key, value) for key, value in named.items() if value is not None]
    for text in where:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"--where {text}: expected KEY=VALUE, such as run.seed=1")
        wanted.append((key, value))
    return wanted


def _matches(value: Any, wanted: str) -> bool:
    """Whether a setting is the one in the text: 8 and 8.0 are the same number."""
    try:
        number = json.loads(wanted)
    except ValueError:
        number = wanted
    if isinstance(value, bool) or isinstance(number, bool):
        return value is number
    return bool(value in (number, wanted))


def _check(value: str | None, known: Sequence[str], option: str) -> None:
    if value is not None and value not in known:
        raise typer.BadParameter(f"{option} {value}: expected one of {', '.join(known)}")


def _check_keys(keys: Sequence[str], runs: Sequence["Summary"]) -> None:
    """Refuse a setting that no run has: it is probably misspelt."""
    from jemkit_cli.runs.summary import ABSENT

    for key in keys if runs else ():
        if all(run.setting(key, ABSENT) is ABSENT for run in runs):
            raise typer.BadParameter(
                f"--where {key}: no run has this setting; `jemkit config show` lists them all"
            )
