"""A run that is found again must have been trained on the images that its row names now."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jemkit.config.layers import flat
from jemkit.errors import ConfigError, DataError
from jemkit.runtime.files import file_hash, read_json
from jemkit.training import pinned
from jemkit.training.build import splits_of
from jemkit.training.mixing import ENTRY
from jemkit_cli.study.plan import IMAGES, Unit


def check_images(units: Sequence[Unit]) -> None:
    """Raise ConfigError for a run on other images than those of a path that changed since.

    A run's key does not contain paths. Nothing is read where they are unchanged.
    """
    compared: list[Any] = []
    for unit in units:
        config = unit.folder / pinned.CONFIG
        if not config.exists():
            continue
        before = dict(flat(read_json(config)["recipe"]))
        now = dict(flat(unit.resolved.tables))
        changed = [key for key in IMAGES if now.get(key) not in (None, before.get(key))]
        recipe, pin = unit.resolved.recipe, pinned.read(config) if changed else None
        run = (recipe.data, recipe.run.valid_fraction, recipe.run.max_train, pin and pin.table)
        if "data.dir" in changed and pin is not None and run not in compared:
            _check_splits(unit, pin)
            compared.append(run)
        if "extra.file" in changed:
            _check_extra(unit, config)


def _check_splits(unit: Unit, pin: pinned.Pin) -> None:
    splits = splits_of(unit.resolved.recipe, pin)
    try:
        for part in pinned.PARTS:
            splits.images(part)
    except DataError as error:
        raise _other(unit, str(error)) from None


def _check_extra(unit: Unit, config: Path) -> None:
    """Compare the file of generated images with the hash of the one that the run was given."""
    entry, file = read_json(config).get(ENTRY) or {}, unit.resolved.recipe.extra.file
    if file is not None and entry and file_hash(Path(file)) != entry.get("sha256"):
        raise _other(unit, f"{file} is another file than its extra.file")


def _other(unit: Unit, why: str) -> ConfigError:
    return ConfigError(
        f"{unit.folder} is a run of the row {unit.row.name!r} on other images: {why}. Choose "
        "another --out"
    )
