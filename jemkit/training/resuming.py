"""The recipe with which a run resumes: its own, except for what may differ."""

from pathlib import Path
from typing import Any, NamedTuple

from jemkit.config.layers import Table, flat
from jemkit.config.recipe import Resolved, complete, resolve
from jemkit.config.registry import Registry
from jemkit.errors import ConfigError, DataError, UsageError
from jemkit.runtime.files import read_json

MOVES = ("run.device", "run.shard")
"""Where a run resumes; config.json keeps where it started."""
MAY_DIFFER = (
    *MOVES, "run.micro_batch", "run.recompute", "run.keep", "run.tensorboard", "data.dir",
    "data.download", "extra.file", "extra.labels",
)  # fmt: skip
"""Settings that do not change a run's outcome; that images, generated ones and the model that
labels them are the same is checked by their hashes."""
EPOCHS = "run.epochs"


class Change(NamedTuple):
    """A setting at the start of the run, and its new value."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} = {_shown(self.now)}: the run was started with {_shown(self.was)}"


class Agreed(NamedTuple):
    """How a run resumes."""

    resolved: Resolved
    config: dict[str, Any]  # the content of config.json from now on
    changed: bool  # whether it differs from before
    epochs: int  # that of the run's newest checkpoint


def changes(was: Table, now: Table) -> list[Change]:
    """The settings in which the tables of two recipes differ."""
    one, other = dict(flat(was)), dict(flat(now))
    keys = [key for key in {**one, **other} if one.get(key, ...) != other.get(key, ...)]
    return [Change(key, one.get(key), other.get(key)) for key in keys]


def refused(was: Table, now: Table) -> list[Change]:
    """The changes with which a run cannot resume; more epochs are allowed."""
    differing = [change for change in changes(was, now) if change.key not in MAY_DIFFER]
    return [change for change in differing if not _longer(change)]


def resolve_for_resume(
    registry: Registry,
    folder: Path,
    *,
    preset: str | None,
    config: Path | None,
    overrides: list[str] | None,
    named: Table,
) -> Resolved:
    """A run's recipe with these options on top, or the complete command that started it."""
    saved = folder / "config.json"
    layers: dict[str, Any] = {
        "preset": preset, "config": config, "overrides": overrides or (), "named": named,
    }  # fmt: skip
    was = complete(resolve(registry, config=saved), registry)
    candidates: list[Resolved] = []
    errors: list[ConfigError] = []
    for base in (saved, None):  # a few options are no complete command, but may be added
        try:
            candidates.append(complete(resolve(registry, base=base, **layers), registry))
        except ConfigError as error:
            errors.append(error)
            continue
        if not refused(was.tables, candidates[-1].tables):
            return candidates[-1]
    if candidates:
        return candidates[0]
    raise errors[0]


def agreed(
    given: Resolved, folder: Path, state: dict[str, Any], path: Path, registry: Registry
) -> Agreed:
    """The recipe with which the run in `folder` resumes from the checkpoint `path`.

    Raises DataError if config.json was changed, and UsageError if another recipe is given.
    """
    config = check_config(folder / "config.json", state, path)
    was = complete(resolve(registry, config=folder / "config.json"), registry)
    origins = config.get("origins", {})
    if wrong := refused(was.tables, given.tables):
        short = any(change.key == EPOCHS for change in wrong)
        more = "; a run can be extended, not shortened" if short else ""
        raise UsageError(
            f"--resume continues with the recipe that the run was started with{more}: "
            f"{'; '.join(map(str, wrong))}. Omit what differs, or start a new run"
        )
    adopted = [change for change in changes(was.tables, given.tables) if change.key not in MOVES]
    recipe, sources = config["recipe"], dict(origins)
    for change in adopted:
        recipe = _with(recipe, change.key.split("."), change.now)
        sources[change.key] = given.origins.get(change.key, "option")
    began = dict(flat(_stored_config(state, path) or {"recipe": config["recipe"]}))
    config = {**config, "recipe": recipe, "origins": sources}
    epochs = began.get(f"recipe.{EPOCHS}", given.recipe.run.epochs)
    return Agreed(given, config, bool(adopted), int(epochs))


def check_config(config: Path, state: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run's config.json; DataError if it is not the one that a checkpoint was saved with."""
    current = _config_of(config.parent)
    saved = _stored_config(state, path)
    if saved is None:  # of jemkit 0.1
        return current
    differences = [
        f"{change.key} is {_shown(change.now)} and was {_shown(change.was)}"
        for change in changes(saved["recipe"], current["recipe"])
        if change.key not in MAY_DIFFER and not _longer(change)
    ]
    if "data" in saved and saved["data"] != current.get("data"):
        differences.append("its entry for the data differs")
    if differences:
        raise DataError(
            f"{config} was changed after the checkpoint {path.name} was saved: "
            f"{'; '.join(differences)}. Restore it; for other settings start a new run"
        )
    return current


def extension(before: int, now: int, rates: tuple[float, float]) -> str:
    """The warning for a run that continues for more epochs than it was started for."""
    return (
        f"the run was started with {before} epochs and continues to {now}. From here on its "
        f"learning rate follows the schedule of {now} epochs ({rates[1]:.3g} at this step, where "
        f"it was {rates[0]:.3g}), so "
        f"it is not bit-for-bit identical to a run of {now} epochs from the start"
    )


def _stored_config(state: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The part of config.json that a checkpoint stores."""
    saved = state.get("config")
    if saved is None or (isinstance(saved, dict) and isinstance(saved.get("recipe"), dict)):
        return saved
    raise DataError(f"{path} is damaged: its copy of the run's config.json is not a recipe")


def _config_of(folder: Path) -> dict[str, Any]:
    content = read_json(folder / "config.json")
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        raise DataError(f"{folder / 'config.json'} contains no recipe; it is not a run's config")
    return content


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
