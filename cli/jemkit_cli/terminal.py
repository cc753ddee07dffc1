"""What every command shares: the registry with its warnings, errors, JSON, tables, progress."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from jemkit.registry import Registry

P = ParamSpec("P")
Watch = Callable[[str, dict[str, Any]], None]
USAGE, DATA, INTERRUPTED = 2, 6, 130


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose user's mistakes end it by one message on stderr, without a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)
        except BrokenPipeError:  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            if error.filename is None:
                raise
            fail(f"{error.filename}: {error.strerror}", DATA)
        except Exception as error:
            from jemkit.errors import JemkitError

            if not isinstance(error, JemkitError):
                raise
            fail(str(error), error.exit_code)

    return run


def fail(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise typer.Exit(code)


def installed_parts(*, third_party: bool) -> "Registry":
    """All parts; one warning for each plug-in that was left out."""
    from jemkit.registry import installed

    registry = installed(third_party=third_party)
    for fault in registry.faults:
        whose = f"plug-in {fault.plugin!r} of {fault.distribution} {fault.version}".rstrip()
        reason = " ".join(fault.reason.split())
        print(f"warning: {whose} is skipped: {reason}", file=sys.stderr, flush=True)
    return registry


def say(text: str) -> None:
    """A line as it is, whatever the terminal's width."""
    print(text, flush=True)


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Valid JSON; a number that is not finite has none and becomes null."""
    print(json.dumps(_finite(value), allow_nan=False, indent=indent), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console() -> "Console":
    """Standard output; without colours where it is no terminal or NO_COLOR is set."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=140)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE, title=title or None, title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


@contextmanager
def watching(run: Path, *, silent: bool) -> Iterator[Watch | None]:
    """Who is told how a run goes: a bar on a terminal, else a plain line for each epoch."""
    where = console()
    if silent:
        yield None
    elif where.is_terminal:
        with _progress(where) as progress:
            yield _bar(progress, run)
    else:
        yield _lines(run)


def _progress(where: "Console") -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    return Progress(
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(bar_width=14),
        MofNCompleteColumn(),
        Left(),
        TextColumn("{task.fields[now]}"),
        console=where,
        transient=True,
    )


def _bar(progress: "Progress", run: Path) -> Watch:
    def watch(kind: str, what: dict[str, Any]) -> None:
        if kind == "start":
            progress.console.print(_beginning(run, what), markup=False, soft_wrap=True)
            progress.add_task(
                "training",
                total=what["total"],
                completed=what["step"],
                epoch=1,
                epochs=what["epochs"],
                now="",
            )
        elif kind == "step":
            task = progress.tasks[0].id
            progress.update(task, completed=what["step"], epoch=what["epoch"], now=_brief(what))
        elif kind == "epoch":
            progress.console.print(_epoch(what))

    return watch


def _lines(run: Path) -> Watch:
    last: dict[str, Any] = {}

    def watch(kind: str, what: dict[str, Any]) -> None:
        if kind == "start":
            say(_beginning(run, what))
        elif kind == "step":
            last.update(what)
        elif kind == "epoch":
            say(f"{_epoch(what)}  {_now(last)}".rstrip())

    return watch


def _beginning(run: Path, what: Mapping[str, Any]) -> str:
    complete = what["step"] == what["total"]
    return f"run {run}" + (": complete already, judged again" if complete else "")


def _now(what: Mapping[str, Any]) -> str:
    """The rate, the loss and the energy gaps of a step, as far as they are known."""
    shown = {"images/s": "{:.0f} images/s", "loss": "loss {:.3f}"}
    shown |= {"gap x+ x-": "E(x+) - E(x-) {:.3f}", "gap x~ x": "E(x~) - E(x) {:.3f}"}
    return "  ".join(text.format(what[key]) for key, text in shown.items() if key in what)


def _brief(what: Mapping[str, Any]) -> str:
    """The same for one line of a terminal: the gap is the density's, else the adversary's."""
    told = [f"{what['images/s']:.0f} images/s", f"loss {what['loss']:.2f}"]
    gaps = [what[key] for key in ("gap x+ x-", "gap x~ x") if key in what]
    return " ".join([*told, *(f"gap {gap:.2f}" for gap in gaps[:1])])


def _epoch(what: Mapping[str, Any]) -> str:
    return (
        f"epoch {what['epoch']:>3}  step {what['step']:>6}  validation accuracy "
        f"{what['accuracy']:.1%}  under PGD-10 {what['pgd10']:.1%}  {what['seconds']:.1f} s"
    )
