"""The options of a study's evaluations are checked before anything is trained."""

from typing import Any

import typer

from jemkit.config.eval_settings import evaluators_of, options_of, settings_of
from jemkit.config.registry import Registry
from jemkit.errors import ConfigError
from jemkit_cli.evaluate import evaluate, requested
from jemkit_cli.study.plan import STATISTICS, Evaluation, Study


def check_evaluations(study: Study, registry: Registry) -> None:
    """Raise ConfigError for options that `jemkit evaluate` would refuse."""
    for options in study.evaluate:
        try:
            wanted, overrides = requested(_parsed(options))
            settings = settings_of({**wanted, "options": options_of(overrides)})
            evaluators_of(settings, registry)
        except ConfigError as error:
            raise ConfigError(f"evaluation {' '.join(options)}: {error}") from None


def _parsed(options: Evaluation) -> dict[str, Any]:
    """The parameters of `jemkit evaluate`, without settings of a file that is not computed yet."""
    app = typer.Typer()
    app.command()(evaluate)
    try:
        given = typer.main.get_command(app).make_context("evaluate", list(options)).params
    except Exception as error:
        if (said := getattr(error, "format_message", None)) is None:
            raise
        raise ConfigError(said()) from None
    overrides = [text for text in given["overrides"] or () if not STATISTICS.search(text)]
    return {**given, "overrides": overrides}
