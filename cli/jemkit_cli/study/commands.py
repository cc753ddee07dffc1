"""`jemkit reproduce` and `jemkit sweep`: many runs, one protocol, one table."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jemkit_cli.progress import tracking
from jemkit_cli.selection import RecipeOptions
from jemkit_cli.terminal import (
    NoPlugins,
    guarded,
    installed_parts,
    say,
    say_json,
    show_table,
    stopping,
    takes,
)

if TYPE_CHECKING:
    from jemkit_cli.study.plan import Study, Unit
    from jemkit_cli.study.table import Table

log = logging.getLogger(__name__)

RUNS = Path("runs")

Jobs = Annotated[
    int, typer.Option(min=1, help="How many runs are trained or evaluated at the same time.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="List the runs with a forecast of the time; run nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the table as one line of JSON.")]
Seeds = Annotated[
    str | None, typer.Option(metavar="LIST", help="Comma-separated, 0,1,2.", show_default=False)
]


@guarded
def reproduce(
    name: Annotated[
        str,
        typer.Argument(help="A study that a plug-in provides, or a TOML file.", metavar="STUDY"),
    ],
    scale: Annotated[
        str | None,
        typer.Option(help="Data and size of the study; digits by default.", show_default=False),
    ] = None,
    seeds: Seeds = None,
    row: Annotated[
        list[str] | None,
        typer.Option(help="Only this row; repeatable.", metavar="NAME", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the runs and the table; runs/SCALE by default.", show_default=False
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data set's files.", show_default=False)
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download the data set if it is missing.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any option, of every row, e.g. run.precision=fp32; repeatable.",
            metavar="K=V", show_default=False,
        ),
    ] = None,
    jobs: Jobs = 1,
    dry_run: DryRun = False,
    no_plugins: NoPlugins = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train and evaluate what a table or figure of a paper compares, and write it.

    Runs that are complete are found again by their recipe; an interrupted call continues.
    """
    from jemkit_cli.study.evaluations import check_evaluations
    from jemkit_cli.study.plan import find_study, part_of, study_resolver, units, with_settings

    own = name.endswith(".toml")  # of the user
    if own and scale is not None:
        raise typer.BadParameter(f"--scale {scale}: {name} has its own data and size; omit --scale")
    scale = scale or "digits"
    registry = installed_parts(third_party=not no_plugins)
    study = part_of(find_study(registry, name, scale), _numbers(seeds), row or ())
    study = with_settings(study, settings or ())
    check_evaluations(study, registry)
    folder = out or RUNS / (Path(name).stem if own else scale)
    data: dict[str, Any] = {} if data_dir is None else {"dir": str(data_dir)}
    extra = {"data": {**data, "download": True} if download else data}
    planned = units(study, registry, folder, study_resolver(study, registry, extra))
    options = ["--no-plugins"] if no_plugins else []
    _go(
        study, planned, folder, Path(name).stem, options, jobs=jobs, dry_run=dry_run,
        as_json=as_json,
    )  # fmt: skip


@takes(RecipeOptions)
def sweep(
    recipe: RecipeOptions,
    seeds: Seeds = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="An attack; repeatable. pgd by default.", metavar="NAME",
                     show_default=False),
    ] = None,
    figure: Annotated[
        list[str] | None,
        typer.Option(help="A column of the table; repeatable.", metavar="NAME", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the table.")] = RUNS / "sweep",
    jobs: Jobs = 1,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train every combination of settings, and write a table of their figures.

    A --set with several values, separated by commas, is varied: --set objective.w2=0.05,0.5.
    """
    from jemkit.config.recipe import resolve
    from jemkit_cli.study.evaluations import check_evaluations
    from jemkit_cli.study.plan import grid, sweep_resolver, sweep_study, units

    registry = recipe.registry()
    if recipe.seed is not None and seeds is not None:
        raise typer.BadParameter("--seed and --seeds are both given; omit --seed")
    first = [f"{name}={value}" for name, value in grid(recipe.overrides or ())[0].items()]
    own = resolve(registry, **{**recipe.layers(), "overrides": first}).recipe.run.seed
    numbers = _numbers(seeds) or (own,)
    study = sweep_study(
        recipe.overrides or (), numbers, tuple(attack or ("pgd",)), tuple(figure or ())
    )
    check_evaluations(study, registry)
    planned = units(study, registry, out, sweep_resolver(registry, recipe.layers()))
    options = ["--no-plugins"] if recipe.no_plugins else []
    _go(study, planned, out, "sweep", options, jobs=jobs, dry_run=dry_run, as_json=as_json)


def _go(
    study: "Study",
    planned: "Sequence[Unit]",
    folder: Path,
    name: str,
    options: Sequence[str],
    *,
    jobs: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run what is missing and write the table; `options` are passed to every command."""
    from jemkit_cli.study.forecast import forecast
    from jemkit_cli.study.images import check_images
    from jemkit_cli.study.plan import check_data, slow_units
    from jemkit_cli.study.running import run_all, state_of
    from jemkit_cli.study.table import table_of
    from jemkit_cli.study.writing import write_all

    states = [(unit, state_of(unit)) for unit in planned]
    check_data([unit for unit, state in states if not state.complete(study.evaluations(unit.row))])
    check_images(planned)
    for text in slow_units([unit for unit, state in states if state.trained is None]):
        log.warning("%s", text)
    if dry_run:
        _show_forecast(forecast(study, planned, jobs), as_json)
        return
    with tracking(silent=as_json) as progress, stopping() as stop:
        run_all(
            planned, study, folder, jobs=jobs, report=_reporter(as_json),
            progress=progress, stop=stop, options=options,
        )  # fmt: skip
    table = table_of(study, planned)
    paths = write_all(table, folder, name)
    if as_json:
        say_json(table.to_json())
        return
    _show(table)
    say(f"table {', '.join(map(str, paths))}")


def _show(table: "Table") -> None:
    from jemkit_cli.study.writing import cells, footnotes, heads

    show_table(heads(table), [cells(table, line) for line in table.lines], table.study.title)
    for note in footnotes(table):
        say(note)


def _show_forecast(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        say_json(rows)
        return
    heads = list(rows[0])
    show_table(heads, [["" if row[h] is None else str(row[h]) for h in heads] for row in rows])
    say("nothing was run")


def _reporter(silent: bool) -> Any:
    return (lambda text: None) if silent else say


def _numbers(seeds: str | None) -> tuple[int, ...]:
    """The seeds of a text such as 0,1,2; none where no text is given."""
    if seeds is None:
        return ()
    try:
        numbers = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise typer.BadParameter(f"--seeds {seeds}: expected integers such as 0,1,2") from None
    if len(set(numbers)) < len(numbers):
        raise typer.BadParameter(f"--seeds {seeds}: a seed is given twice")
    return numbers
