"""`jemkit train`: trains a recipe in a run folder, and evaluates it."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jemkit_cli import process
from jemkit_cli.progress import watching
from jemkit_cli.results import record, show
from jemkit_cli.selection import RecipeOptions
from jemkit_cli.terminal import USAGE, fail, say, say_json, show_table, stopping, takes

if TYPE_CHECKING:
    from jemkit.config.recipe import Resolved
    from jemkit.config.registry import Registry
    from jemkit.training.trainer import Summary

RUNS = Path("runs")


@takes(RecipeOptions)
def train(
    recipe: RecipeOptions,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder; a new one in runs/ by default.", show_default=False),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out, or in runs/latest; more --epochs extend it.",
        ),
    ] = False,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Initial weights: a run, a checkpoint or an exported model.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build and check the run, but write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as one line of JSON.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the results.")] = False,
) -> None:
    """Train any backbone with any objective, and evaluate the best epoch on the test split."""
    if resume and dry_run:
        fail("--resume continues a run that was checked when it started; omit --dry-run", USAGE)
    silent = quiet or as_json or bool(process.speaker())
    registry = recipe.registry()
    if resume:
        out = (out or RUNS / "latest").resolve()
        resolved = _saved(registry, out, recipe)
    else:
        resolved = recipe.resolve(registry)
        if out is None and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            fail("torchrun --max-restarts continues the run in --out: name the folder", USAGE)
        out = out or _new_run(resolved)
        if recipe.preset is not None and not silent:
            _introduce(registry, recipe.preset)
    if dry_run:
        _show_plan(resolved, out, init_from, as_json)
        return
    summary = _trained(registry, resolved, out, resume=resume, init_from=init_from, silent=silent)
    if process.speaker():  # rank 0 shows them
        return
    if as_json:
        say_json(record(summary, resolved))
    else:
        show(summary)


def _saved(registry: "Registry", out: Path, recipe: RecipeOptions) -> "Resolved":
    """The recipe of the run in `out`, with the given options checked against it."""
    from jemkit.runtime.run_dir import RunFolder
    from jemkit.training.resuming import resolve_for_resume

    RunFolder.open(out)
    return resolve_for_resume(registry, out, **recipe.layers())


def _new_run(resolved: "Resolved") -> Path:
    """An unused name for a run: the parts and the time."""
    parts = [resolved.tables[table]["use"] for table in ("backbone", "objective", "data")]
    when = [
        time.strftime("%Y%m%d-%H%M%S"),
        str(os.getpid()),
    ]  # two runs may start in the same second
    name = RUNS / "-".join([*parts, *when])
    again = (name.with_name(f"{name.name}-{count}") for count in range(2, 1000))
    return next((path for path in (name, *again) if not path.exists()), name)


def _introduce(registry: "Registry", preset: str) -> None:
    from jemkit.config.recipe import about_preset

    say(f"preset {preset}: {about_preset(registry, preset)}")


def _trained(
    registry: "Registry",
    resolved: "Resolved",
    out: Path,
    *,
    resume: bool,
    init_from: Path | None,
    silent: bool,
) -> "Summary":
    from jemkit.errors import Preempted
    from jemkit.training.run import train as run

    with watching(out, silent=silent) as watch, stopping() as stop:
        try:
            return run(
                resolved, out, registry=registry, resume=resume, init_from=init_from,
                watch=watch, stop=stop, latest=RUNS,
            )  # fmt: skip
        except Preempted as error:
            error.args = (f"{error} --out {out}",)
            raise


def _show_plan(resolved: "Resolved", out: Path, init_from: Path | None, as_json: bool) -> None:
    from jemkit.training.plan import plan

    rows = plan(resolved, out, init_from=init_from)
    if as_json:
        say_json(rows)
        return
    show_table(["", ""], [[name, str(value)] for name, value in rows.items()])
    say("nothing was written")
