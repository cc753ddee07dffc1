"""`jemkit verify-resume`: tests that an interrupted run resumes bit for bit."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jemkit_cli.selection import RecipeOptions
from jemkit_cli.terminal import say, say_json, show_table, stopping, takes

if TYPE_CHECKING:
    from jemkit.testing.resume import Verdict


@takes(RecipeOptions, "data_dir", "device", "deterministic", "overrides", "no_plugins")
def verify_resume(
    recipe: RecipeOptions,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run, a config.json or a TOML recipe.")
    ],
    steps: Annotated[
        int, typer.Option(help="How many steps to train, with and without interruptions.")
    ] = 6,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="One line of JSON: whether it is exact, and each interruption."
        ),
    ] = False,
) -> None:
    """Train a few steps of a recipe with and without interruptions; exit code 1 if any bit of the
    state differs.

    On the CPU, and on CUDA with --deterministic, a resumed run equals an uninterrupted one bit for
    bit. The steps are trained in a temporary folder, on fewer images so that an epoch ends.
    """
    import tempfile

    from jemkit.runtime.run_dir import RunFolder
    from jemkit.testing.resume import check_run
    from jemkit.testing.resume import verify_resume as verify

    recipe.config = RunFolder.open(run).path / "config.json" if run.is_dir() else run
    registry = recipe.registry()
    own_data = not any(option.startswith("data.") for option in recipe.overrides or ())
    if run.is_dir() and recipe.data_dir is None and own_data:
        check_run(run.resolve(), registry)
    resolved = recipe.resolve(registry)
    progress = (lambda _: None) if as_json else say
    with stopping() as stop, tempfile.TemporaryDirectory(prefix="jemkit-verify-") as folder:
        verdict = verify(resolved, Path(folder), steps=steps, progress=progress, stop=stop)
    if as_json:
        cuts = [cut._asdict() for cut in verdict.cuts]
        say_json({"exact": verdict.exact, **verdict._asdict(), "cuts": cuts})
    else:
        _show(verdict)
    if not verdict.exact:
        raise typer.Exit(1)


def _show(verdict: "Verdict") -> None:
    columns = ["state", "values", *(f"cut {cut.where}" for cut in verdict.cuts)]
    parts = {**verdict.compared, **{part: 0 for cut in verdict.cuts for part in cut.differs}}
    rows = [
        [part, str(parts[part]), *(cut.differs.get(part, "equal") for cut in verdict.cuts)]
        for part in sorted(parts)
    ]
    show_table(columns, rows)
    times = f"{verdict.steps} steps on {verdict.device}, {verdict.steps_per_epoch} an epoch"
    end = "resume is exact, bit for bit" if verdict.exact else "resume is NOT exact: see the paths"
    say(f"{times}: {end}")
