"""The recipe with which a run resumes: its own, except for what may differ."""

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from jemkit.config.layers import Table, flat, inside
from jemkit.config.recipe import Resolved, complete, resolve
from jemkit.config.registry import Registry
from jemkit.errors import DataError, UsageError
from jemkit.runtime.files import read_json

MOVES = ("run.device", "run.shard")
"""Where a run resumes; config.json keeps where it started."""
MAY_DIFFER = (
    *MOVES, "run.micro_batch", "run.recompute", "run.keep", "run.tensorboard", "trackers",
    "data.dir", "data.download", "extra.file", "extra.labels",
)  # fmt: skip
"""Settings that do not change a run's outcome; what they name is compared by its hash."""
EPOCHS = "run.epochs"


class Change(NamedTuple):
    """A setting at the start of the run, and its new value."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} = {_shown(self.now)}: the run was started with {_shown(self.was)}"


def changes(was: Table, now: Table) -> list[Change]:
    """The settings in which the tables of two recipes differ."""
    one, other = dict(flat(was)), dict(flat(now))
    keys = [key for key in {**one, **other} if one.get(key, ...) != other.get(key, ...)]
    return [Change(key, one.get(key), other.get(key)) for key in keys]


def refused(was: Table, now: Table) -> list[Change]:
    """The changes with which a run cannot resume; more epochs are allowed."""
    differing = changes(was, now)
    return [c for c in differing if not may_differ(c.key) and not _longer(c)]


def may_differ(key: str) -> bool:
    """Whether a setting does not change a run's outcome."""
    return key in MAY_DIFFER or key.partition(".")[0] in MAY_DIFFER


def resolve_for_resume(registry: Registry, folder: Path, **layers: Any) -> Resolved:
    """A run's recipe with these layers of `resolve` on top; those that it has change nothing."""
    layers["overrides"] = layers.get("overrides") or ()
    return complete(resolve(registry, base=folder / "config.json", **layers), registry)


def agreed(
    given: Resolved, folder: Path, state: dict[str, Any], path: Path, registry: Registry
) -> dict[str, Any]:
    """The `config` to resume from the checkpoint `path`, if it `changed`, and that one's `epochs`.

    Raises DataError if config.json was changed, and UsageError if another recipe is given.
    """
    config = check_config(folder / "config.json", state, path)
    was = complete(resolve(registry, config=folder / "config.json"), registry)
    if wrong := refused(was.tables, given.tables):
        short = any(change.key == EPOCHS for change in wrong)
        more = "; a run can be extended, not shortened" if short else ""
        raise UsageError(
            f"--resume continues with the recipe that the run was started with{more}: "
            f"{'; '.join(map(str, wrong))}. Omit what differs, or start a new run"
        )
    began = dict(flat((_stored_config(state, path) or config)["recipe"]))
    origins = config.get("origins")
    recipe, sources = deepcopy(config["recipe"]), dict(origins if isinstance(origins, dict) else {})
    tracked = given.tables.get("trackers", {})
    adopted = [
        change for change in changes(was.tables, given.tables)
        if change.key not in MOVES and not inside(change.key, "trackers")
    ]  # fmt: skip
    for change in adopted:
        table, (*tables, option) = recipe, change.key.split(".")
        for name in tables:
            table = table.setdefault(name, {})
        table[option] = change.now
        sources[change.key] = given.origins.get(change.key, "option")
    epochs = int(began.get(EPOCHS, given.recipe.run.epochs))
    changed = bool(adopted) or recipe.get("trackers", {}) != tracked
    config = {**config, "recipe": {**recipe, "trackers": tracked}, "origins": sources}
    return {"config": config, "changed": changed, "epochs": epochs}


def check_config(config: Path, state: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run's config.json; DataError if it is not the one that a checkpoint was saved with."""
    current = read_json(config)
    if not isinstance(current, dict) or not isinstance(current.get("recipe"), dict):
        raise DataError(f"{config} contains no recipe; it is not a run's config")
    saved = _stored_config(state, path)
    if saved is None:  # of jemkit 0.1
        return current
    differences = [
        f"{change.key} is {_shown(change.now)} and was {_shown(change.was)}"
        for change in refused(saved["recipe"], current["recipe"])
    ]
    if "data" in saved and saved["data"] != current.get("data"):
        differences.append("its entry for the data differs")
    if differences:
        raise DataError(
            f"{config} was changed after the checkpoint {path.name} was saved: "
            f"{'; '.join(differences)}. Restore it; for other settings start a new run"
        )
    return current


def _stored_config(state: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The part of config.json that a checkpoint stores."""
    saved = state.get("config")
    if saved is None or (isinstance(saved, dict) and isinstance(saved.get("recipe"), dict)):
        return saved
    raise DataError(f"{path} is damaged: its copy of the run's config.json is not a recipe")


def _longer(change: Change) -> bool:
    numbers = isinstance(change.was, int) and isinstance(change.now, int)
    return change.key == EPOCHS and numbers and change.now > change.was


def _shown(value: Any) -> str:
    return "not set" if value is None else f"{value}"
