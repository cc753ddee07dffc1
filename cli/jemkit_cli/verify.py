"""`jemkit verify-resume`: proof that a run of one's own goes on bit for bit."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jemkit_cli import selection as pick
from jemkit_cli.terminal import guarded, installed_parts, say, say_json, show_table, stopping

if TYPE_CHECKING:
    from jemkit.testing.resume import Verdict


@guarded
def verify_resume(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run, a config.json or a TOML recipe.")
    ],
    steps: Annotated[int, typer.Option(help="How many steps to train, whole and cut.")] = 6,
    data_dir: pick.DataDir = None,
    device: pick.Device = None,
    deterministic: pick.Deterministic = None,
    overrides: pick.Set = None,
    no_plugins: pick.NoPlugins = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON: whether it is exact, every cut.")
    ] = False,
) -> None:
    """Train a few steps of a recipe whole and cut; exit code 1 where one bit of the state differs.

    On the CPU, and on CUDA with --deterministic, a run that goes on is the run that was never cut.
    The steps are trained in a temporary folder, on fewer images so that an epoch ends on the way.
    """
    import tempfile

    from jemkit.runtime.run_dir import RunFolder
    from jemkit.testing.resume import check_run
    from jemkit.testing.resume import verify_resume as verify

    config = RunFolder.open(run).path / "config.json" if run.is_dir() else run
    registry = installed_parts(third_party=not no_plugins)
    if (
        run.is_dir()
        and data_dir is None
        and not any(o.startswith("data.") for o in overrides or ())
    ):
        check_run(run.resolve(), registry)
    options = {"data_dir": data_dir, "device": device, "deterministic": deterministic}
    recipe = pick.chosen(registry, options, preset=None, config=config, overrides=overrides)
    told = (lambda _: None) if as_json else say
    with stopping() as stop, tempfile.TemporaryDirectory(prefix="jemkit-verify-") as folder:
        verdict = verify(recipe, Path(folder), steps=steps, progress=told, stop=stop)
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
