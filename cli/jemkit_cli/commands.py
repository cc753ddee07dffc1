"""The commands of `jemkit` and their options."""

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jemkit_cli import bench, config, plugins
from jemkit_cli.check import check
from jemkit_cli.doctor import doctor
from jemkit_cli.evaluate import evaluate
from jemkit_cli.fid_stats import fid_stats
from jemkit_cli.foreign import export_model, import_model
from jemkit_cli.report import compare, report
from jemkit_cli.runs.listing import ls
from jemkit_cli.runs.removing import rm
from jemkit_cli.sample import sample
from jemkit_cli.show.command import show
from jemkit_cli.study.commands import reproduce, sweep
from jemkit_cli.terminal import say
from jemkit_cli.train import train
from jemkit_cli.verify import verify_resume


class _Group(TyperGroup):
    """Shows the error of a value without pydantic's prefix."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    name="jemkit",
    cls=_Group,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Train, sample and evaluate joint energy-based models: any backbone, any objective.",
)
app.command()(train)
app.command()(sample)
app.command()(evaluate)
app.command()(report)
app.command()(compare)
app.command()(ls)
app.command()(rm)
app.command()(show)
app.command()(sweep)
app.command()(reproduce)
app.command("import")(import_model)
app.command("export")(export_model)
app.command()(check)
app.command()(doctor)
app.command("verify-resume")(verify_resume)
app.command("fid-stats")(fid_stats)
app.add_typer(plugins.app, name="plugins")
app.add_typer(config.app, name="config")
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        say(version("jemkit"))
        raise typer.Exit


@app.callback()
def _jemkit(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def run(arguments: list[str] | None) -> None:
    """Parse the command line and run the command."""
    app(args=arguments, prog_name="jemkit")
