"""The options of a study's evaluations are checked before anything is trained."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from jemkit.config.eval_settings import evaluators_of, options_of, settings_of, threat_of
from jemkit.config.registry import Registry
from jemkit.errors import ConfigError
from jemkit_cli.evaluate import requested
from jemkit_cli.study.plan import STATISTICS, Study
from jemkit_cli.study.statistics import statistics_options

ANY_RADIUS, ANY_PIXELS = 1.0, 10**9
"""In place of those of the data set, which the runs will have."""


def check_evaluations(study: Study, registry: Registry) -> None:
    """Raise ConfigError for options that `jemkit evaluate` or `fid-stats` would refuse.

    What depends on the model or on its images is checked when the evaluation runs.
    """
    if text := statistics_options(study.evaluate):
        try:
            _parameters("fid-stats", ["DATASET", "--out", "FILE", *shlex.split(text)])
        except ValueError as error:
            raise ConfigError(f"{{statistics{text}}}: {error}") from None
    for evaluation in study.evaluate:
        try:
            wanted, overrides = requested(_parameters("evaluate", ["RUN", *evaluation]))
            options = _without_file(options_of(overrides))
            settings = settings_of({**wanted, "options": options})
            threat_of(settings, ANY_RADIUS, ANY_PIXELS)
            evaluators_of(settings, registry)
        except ConfigError as error:
            raise type(error)(f"evaluation {' '.join(evaluation)}: {error}") from None


def _without_file(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options with None for the file of statistics, which is not computed yet."""

    def value(given: Any) -> Any:
        return None if isinstance(given, str) and STATISTICS.search(given) else given

    return {part: {key: value(v) for key, v in table.items()} for part, table in options.items()}


def _parameters(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The parameters that a command of jemkit would be called with."""
    from jemkit_cli.commands import app  # which imports this package

    group = typer.main.get_group(app)
    try:
        return group.commands[command].make_context(command, list(arguments)).params
    except Exception as error:  # its type is click's, which newer versions of typer contain
        if (message := getattr(error, "format_message", None)) is None:
            raise
        raise ConfigError(f"{command}: {message()}") from None
