"""A run that exists must have been trained on the images that its row names now."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jemkit.config.layers import flat
from jemkit.errors import ConfigError, DataError
from jemkit.runtime.files import file_hash, read_json
from jemkit.runtime.work_cache import tensors_hash
from jemkit.training import pinned
from jemkit.training.build import splits_of
from jemkit.training.mixing import ENTRY
from jemkit.training.opened import open_model
from jemkit_cli.study.plan import IMAGES, Unit


def check_images(units: Sequence[Unit]) -> None:
    """Raise ConfigError for a run on other images, if a path in its recipe has changed since.

    A run's key does not contain paths. Nothing is read where they are unchanged. Raises DataError
    for images that are missing.
    """
    compared: list[Any] = []
    file_sha, model_sha = cache(file_hash), cache(_weights)
    for unit in units:
        config = unit.folder / pinned.CONFIG
        if not config.exists():
            continue
        content = read_json(config)
        before, now = dict(flat(content["recipe"])), dict(flat(unit.resolved.tables))
        changed = [key for key in IMAGES if now.get(key) not in (None, before.get(key))]
        recipe, pin = unit.resolved.recipe, pinned.read(config) if changed else None
        run = (recipe.data, recipe.run.valid_fraction, recipe.run.max_train, pin and pin.table)
        if "data.dir" in changed and pin is not None and run not in compared:
            _check_splits(unit, pin)
            compared.append(run)
        entry, extra = content.get(ENTRY) or {}, recipe.extra
        if "extra.file" in changed and entry and file_sha(extra.file) != entry["sha256"]:
            raise _other(unit, f"{extra.file} is another file than its extra.file")
        labels = entry.get("labels") or {}
        if "extra.labels" in changed and labels and model_sha(extra.labels) != labels["weights"]:
            raise _other(unit, f"{extra.labels} is another model than its extra.labels")


def _check_splits(unit: Unit, pin: pinned.Pin) -> None:
    recipe = unit.resolved.recipe
    recipe.data.load("test")
    splits = splits_of(recipe, pin)
    try:
        for part in pinned.PARTS:
            splits.images(part)
    except DataError as error:
        raise _other(unit, str(error)) from None


def _weights(model: Path) -> str:
    """The hash of a model's weights, as a run records that of its labeller."""
    return tensors_hash(open_model(model).weights)


def _other(unit: Unit, why: str) -> ConfigError:
    return ConfigError(
        f"{unit.folder} is a run of the row {unit.row.name!r} on other images: {why}. Choose "
        "another --out"
    )
