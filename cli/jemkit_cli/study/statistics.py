"""The Inception statistics of a study's training images, computed once for all of its runs."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jemkit.config.layers import flat
from jemkit.errors import ConfigError
from jemkit_cli.study.plan import STATISTICS, Evaluation, Unit

PLACE = ("use", "dir", "download")
"""Settings of a data set that do not change its images, and its name."""


def statistics_file(
    units: Sequence[Unit], evaluations: Iterable[Evaluation], out: Path
) -> Path | None:
    """The file of the statistics that these evaluations name; None if none does.

    Its name depends on the data set and its options. Raises ConfigError if the runs differ in them.
    """
    if not any(STATISTICS in text for options in evaluations for text in options):
        return None
    sets = {json.dumps(_images(unit), sort_keys=True, default=str) for unit in units}
    if len(sets) > 1:
        raise ConfigError(
            f"the rows have different data sets ({'; '.join(sorted(sets))}), and {STATISTICS} is "
            "the file of one: give the rows one [common.data]"
        )
    digest = hashlib.sha256(sets.pop().encode()).hexdigest()[:8]
    return out / f"statistics-{digest}.safetensors"


def statistics_command(units: Sequence[Unit], path: Path) -> list[str]:
    """The command that writes the file."""
    data: dict[str, Any] = units[0].resolved.tables["data"]
    where = ["--data-dir", str(data["dir"])] if data.get("dir") else []
    options = [(k, v) for k, v in flat(data) if k not in PLACE and v is not None]
    more = [text for k, v in options for text in ("--set", f"data.{k}={json.dumps(v)}")]
    return ["fid-stats", str(data["use"]), "--out", str(path), "--json", *where, *more]


def _images(unit: Unit) -> dict[str, Any]:
    data: dict[str, Any] = unit.resolved.tables["data"]
    return {k: v for k, v in data.items() if k == "use" or k not in PLACE}
