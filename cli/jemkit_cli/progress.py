"""Progress of long work: bars on a terminal, otherwise a line from time to time."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jemkit_cli.printable import printable
from jemkit_cli.terminal import console, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Watch = Callable[[str, dict[str, Any]], None]


@contextmanager
def watching(run: Path, *, silent: bool) -> Iterator[Watch | None]:
    """Progress of a run: a bar on a terminal, otherwise a line per epoch."""
    where = console()
    if silent:
        yield None
    elif not where.is_terminal:
        yield _lines(run)
    else:
        with _progress(
            where, "epoch {task.fields[epoch]}/{task.fields[epochs]}", "now"
        ) as progress:
            yield _bar(progress, run)


def _progress(where: "Console", text: str, *fields: str) -> "Progress":
    """A bar below a text, with the remaining time and some fields of its task."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    more = (TextColumn(f"{{task.fields[{field}]}}", markup=False) for field in fields)
    columns = (TextColumn(text, markup=False), BarColumn(bar_width=14), MofNCompleteColumn())
    return Progress(*columns, Left(), *more, console=where, transient=True)


def _bar(progress: "Progress", run: Path) -> Watch:
    def watch(kind: str, what: dict[str, Any]) -> None:
        if text := _message(run, kind, what):
            progress.console.print(printable(text), markup=False, soft_wrap=True)
        if kind == "start":
            now = {"completed": what["step"], "epoch": 1, "epochs": what["epochs"], "now": ""}
            progress.add_task("training", total=what["total"], **now)
        elif kind == "step":
            task = progress.tasks[0].id
            progress.update(task, completed=what["step"], epoch=what["epoch"], now=_brief(what))

    return watch


def _lines(run: Path) -> Watch:
    last: dict[str, Any] = {}

    def watch(kind: str, what: dict[str, Any]) -> None:
        if kind == "step":
            last.update(what)
        elif text := _message(run, kind, what):
            say(f"{text}  {_now(last)}".rstrip() if kind == "epoch" else text)

    return watch


def _message(run: Path, kind: str, what: Mapping[str, Any]) -> str:
    """The text for an event of a run; most events have none."""
    if kind == "start":
        complete = what["step"] == what["total"]
        return f"run {run}" + (": already complete, evaluated again" if complete else "")
    if kind == "epoch":
        return (
            f"epoch {what['epoch']:>3}  step {what['step']:>6}  validation accuracy "
            f"{what['accuracy']:.1%}  under PGD-10 {what['pgd10']:.1%}  {what['seconds']:.1f} s"
        )
    if kind == "rollback":
        return (
            f"step {what['step']}: {what['what']}; back to step {what['to']}, attempt "
            f"{what['attempt']} of {what['of']} with {what['with']}"
        )
    if kind == "compiled":
        return (
            f"{what['graphs']} gradient(s) compiled in {what['seconds']:g} s; "
            "docs/performance.md says when that pays"
        )
    return ""


def _now(what: Mapping[str, Any]) -> str:
    """The rate, the loss and the energy gaps of a step, if they are known."""
    shown = {"images/s": "{:.0f} images/s", "loss": "loss {:.3f}"}
    shown |= {"gap x+ x-": "E(x+) - E(x-) {:.3f}", "gap x~ x": "E(x~) - E(x) {:.3f}"}
    return "  ".join(text.format(what[key]) for key, text in shown.items() if key in what)


def _brief(what: Mapping[str, Any]) -> str:
    """The same for one line of a terminal: the density's gap, or else the adversarial one."""
    parts = [f"{what['images/s']:.0f} images/s", f"loss {what['loss']:.2f}"]
    gaps = [what[key] for key in ("gap x+ x-", "gap x~ x") if key in what]
    return " ".join([*parts, *(f"gap {gap:.2f}" for gap in gaps[:1])])


Track = Callable[[str, int, int], None]


SELDOM = 30.0
"""Seconds between two lines about long work."""


@contextmanager
def tracking(*, silent: bool) -> Iterator[Track | None]:
    """Progress of long work: a bar for each part, otherwise a line from time to time."""
    where = console()
    if silent:
        yield None
    elif not where.is_terminal:
        yield _seldom()
    else:
        with _progress(where, "{task.description}") as progress:
            yield _bars(progress)


def _seldom() -> Track:
    """A line on standard error every SELDOM seconds, with the remaining or the elapsed time."""
    began: dict[
        str, tuple[float, int]
    ] = {}  # when a part was first reported, and its progress then
    shown_at = [time.monotonic()]

    def track(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        since, first = began.setdefault(what, (now, done))
        if now - shown_at[0] < SELDOM:
            return
        shown_at[0], taken = now, now - since
        time_is = f"{taken:.0f} s so far"
        if done > first:
            time_is = f"{taken * (total - done) / (done - first):.0f} s left"
        line = f"{what}: {done} of {total}, {time_is}"
        print(printable(line), file=sys.stderr, flush=True)

    return track


def _bars(progress: "Progress") -> Track:
    tasks: dict[str, Any] = {}

    def track(what: str, done: int, total: int) -> None:
        if what not in tasks:
            for old in tasks.values():
                progress.update(old, visible=False)
            tasks[what] = progress.add_task(printable(what), total=total)
        progress.update(tasks[what], completed=done, total=total)

    return track
