"""What a run goes on with: the recipe it was started with, but for what may differ."""

from pathlib import Path
from typing import Any, NamedTuple

from jemkit.config.layers import Table, flat
from jemkit.config.recipe import Resolved, complete, resolve
from jemkit.config.registry import Registry
from jemkit.errors import ConfigError, DataError, UsageError
from jemkit.runtime.files import read_json

MOVES = ("run.device", "run.shard")
"""Where a run goes on; config.json keeps where it began."""
MAY_DIFFER = (
    *MOVES, "run.micro_batch", "run.recompute", "run.keep", "run.tensorboard", "data.dir",
    "data.download",
)  # fmt: skip
"""What does not change a run's outcome; that the images are the same is checked by their hash."""
EPOCHS = "run.epochs"


class Change(NamedTuple):
    """A setting that a run was started with, and the one that came."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} = {_shown(self.now)}: the run was started with {_shown(self.was)}"


class Agreed(NamedTuple):
    """How a run goes on."""

    resolved: Resolved
    config: dict[str, Any]  # as config.json is from now on
    changed: bool  # whether that is another than it was
    epochs: int  # that the newest checkpoint's run was of


def changes(was: Table, now: Table) -> list[Change]:
    """The settings that two recipes' tables differ in."""
    one, other = dict(flat(was)), dict(flat(now))
    keys = [key for key in {**one, **other} if one.get(key, ...) != other.get(key, ...)]
    return [Change(key, one.get(key), other.get(key)) for key in keys]


def refused(was: Table, now: Table) -> list[Change]:
    """Those that a run cannot go on with; more epochs it can."""
    found = [change for change in changes(was, now) if change.key not in MAY_DIFFER]
    return [change for change in found if not _longer(change)]


def asked_again(
    registry: Registry,
    folder: Path,
    *,
    preset: str | None,
    config: Path | None,
    overrides: list[str] | None,
    named: Table,
) -> Resolved:
    """A run's recipe with these options on top, or the whole command that it was started with."""
    saved = folder / "config.json"
    layers: dict[str, Any] = {
        "preset": preset, "config": config, "overrides": overrides or (), "named": named,
    }  # fmt: skip
    was = complete(resolve(registry, config=saved), registry)
    found: list[Resolved] = []
    errors: list[ConfigError] = []
    for base in (saved, None):  # a few options are no whole command, but may go on top
        try:
            found.append(complete(resolve(registry, base=base, **layers), registry))
        except ConfigError as error:
            errors.append(error)
            continue
        if not refused(was.tables, found[-1].tables):
            return found[-1]
    if found:
        return found[0]
    raise errors[0]


def agreed(
    given: Resolved, folder: Path, state: dict[str, Any], path: Path, registry: Registry
) -> Agreed:
    """What the run in `folder` goes on with from the checkpoint `path`.

    Raises DataError where config.json was changed, and UsageError where another recipe is given.
    """
    config = check_config(folder / "config.json", state, path)
    was = complete(resolve(registry, config=folder / "config.json"), registry)
    origins = config.get("origins", {})
    if wrong := refused(was.tables, given.tables):
        short = any(change.key == EPOCHS for change in wrong)
        more = "; a run can be extended, not shortened" if short else ""
        raise UsageError(
            f"--resume goes on with the recipe that the run was started with{more}: "
            f"{'; '.join(map(str, wrong))}. Leave out what differs, or begin a new run"
        )
    kept = [change for change in changes(was.tables, given.tables) if change.key not in MOVES]
    recipe, sources = config["recipe"], dict(origins)
    for change in kept:
        recipe = _with(recipe, change.key.split("."), change.now)
        sources[change.key] = given.origins.get(change.key, "option")
    began = dict(flat(_kept_by(state, path) or {"recipe": config["recipe"]}))
    config = {**config, "recipe": recipe, "origins": sources}
    epochs = began.get(f"recipe.{EPOCHS}", given.recipe.run.epochs)
    return Agreed(given, config, bool(kept), int(epochs))


def check_config(config: Path, state: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run's config.json; a DataError where it is not the one that a checkpoint was saved with."""
    found = _config_of(config.parent)
    saved = _kept_by(state, path)
    if saved is None:  # of jemkit 0.1
        return found
    told = [
        f"{change.key} is {_shown(change.now)} and was {_shown(change.was)}"
        for change in changes(saved["recipe"], found["recipe"])
        if change.key not in MAY_DIFFER and not _longer(change)
    ]
    if "data" in saved and saved["data"] != found.get("data"):
        told.append("what it says of the data is not what it said")
    if told:
        raise DataError(
            f"{config} was changed after the checkpoint {path.name} was saved: {'; '.join(told)}. "
            "Put it back as it was; for other settings begin a new run"
        )
    return found


def extension(before: int, now: int, rates: tuple[float, float]) -> str:
    """What is told of a run that goes on for longer than it was started for."""
    return (
        f"the run was started with {before} epochs and goes on to {now}. From here on its learning "
        f"rate is that of {now} epochs ({rates[1]:.3g} at this step, where it was {rates[0]:.3g}), "
        f"so that it is not, bit for bit, a run of {now} epochs from the start"
    )


def _kept_by(state: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """What a checkpoint keeps of its run's config.json."""
    saved = state.get("config")
    if saved is None or (isinstance(saved, dict) and isinstance(saved.get("recipe"), dict)):
        return saved
    raise DataError(f"{path} is damaged: what it keeps of its run's config.json is no recipe")


def _config_of(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "config.json")
    if not isinstance(found, dict) or not isinstance(found.get("recipe"), dict):
        raise DataError(f"{folder / 'config.json'} holds no recipe; it is not a run's config")
    return found


def _longer(change: Change) -> bool:
    numbers = isinstance(change.was, int) and isinstance(change.now, int)
    return change.key == EPOCHS and numbers and change.now > change.was


def _with(table: Table, path: list[str], value: Any) -> Table:
    """A table with one value changed."""
    first, *rest = path
    if rest:
        return {**table, first: _with(table.get(first, {}), rest, value)}
    return {**table, first: value}


def _shown(value: Any) -> str:
    return "not set" if value is None else f"{value}"
