"""The Inception statistics of a study's training images, computed once for all of its runs."""

import hashlib
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jemkit.config.layers import flat
from jemkit.errors import ConfigError
from jemkit_cli.study.plan import STATISTICS, Evaluation, Unit

PLACE = ("use", "dir", "download")
"""Settings of a data set that do not change its images, and its name."""


class StatisticsFile(NamedTuple):
    """A file of statistics, and the command that writes it."""

    file: Path
    command: list[str]

    def substituted(self, options: Evaluation) -> Evaluation:
        """The options with this file in place of `{statistics}`."""
        return tuple(STATISTICS.sub(lambda _: str(self.file), text) for text in options)


def study_statistics(
    units: Sequence[Unit], evaluations: Iterable[Evaluation], out: Path
) -> StatisticsFile | None:
    """The statistics that these evaluations name; None if none does.

    The file's name depends on the data set, its options and those of `jemkit fid-stats`. Raises
    ConfigError if the runs or the evaluations differ in them.
    """
    options = statistics_options(evaluations)
    if options is None:
        return None
    sets = {json.dumps(_images(unit), sort_keys=True, default=str) for unit in units}
    if len(sets) > 1:
        raise ConfigError(
            f"the rows have different data sets ({'; '.join(sorted(sets))}), and {{statistics}} is "
            "the file of one: give the rows one [common.data]"
        )
    digest = hashlib.sha256((sets.pop() + options).encode()).hexdigest()[:8]
    file = out / f"statistics-{digest}.safetensors"
    return StatisticsFile(file, _command(units[0], file, shlex.split(options)))


def statistics_options(evaluations: Iterable[Evaluation]) -> str | None:
    """The text of the options of `jemkit fid-stats` in these evaluations; None if they name no
    statistics, ConfigError if they name several."""
    texts = [text for options in evaluations for text in options]
    several = sorted({match[1] for text in texts for match in STATISTICS.finditer(text)})
    if len(several) > 1:
        named = " and ".join(f"{{statistics{options}}}" for options in several)
        raise ConfigError(
            f"the evaluations name {named}: a study has one set of FID statistics, name one"
        )
    return several[0] if several else None


def _command(unit: Unit, path: Path, options: Sequence[str]) -> list[str]:
    data: dict[str, Any] = unit.resolved.tables["data"]
    where = ["--data-dir", str(data["dir"])] if data.get("dir") else []
    settings = [(k, v) for k, v in flat(data) if k not in PLACE and v is not None]
    more = [text for k, v in settings for text in ("--set", f"data.{k}={json.dumps(v)}")]
    device = unit.resolved.recipe.run.device
    where += [] if device == "auto" else ["--device", device]
    name, out = str(data["use"]), ["--out", str(path), "--json"]
    return ["fid-stats", name, *options, *where, *more, *out]


def _images(unit: Unit) -> dict[str, Any]:
    data: dict[str, Any] = unit.resolved.tables["data"]
    return {k: v for k, v in data.items() if k == "use" or k not in PLACE}
