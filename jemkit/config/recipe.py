"""Recipes: everything that determines a run, merged from layers of settings."""

import copy
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator

from jemkit.attacks.base import HasBatchNormMode
from jemkit.backbone import BackboneSpec, without_batch_norm
from jemkit.config.extra import Extra
from jemkit.config.layers import (
    PARTS,
    Layer,
    Stack,
    Table,
    choices,
    flat,
    leading_comment,
    override_layers,
    part_defaults,
    read_layer,
    spoken,
)
from jemkit.config.messages import explain
from jemkit.config.optim import SGD, OptimizerOptions, Schedule
from jemkit.config.registry import Registry
from jemkit.config.unused import check_unused
from jemkit.data import Augmentation, Dataset
from jemkit.errors import ConfigError, DataError
from jemkit.metrics.tracker import TrackerSpec
from jemkit.objective import NamesStreams, Objective, ObjectiveSpec
from jemkit.options import Options, PartOf, nearest, parts_of
from jemkit.runtime.divergence_monitor import Sentinel
from jemkit.runtime.precision import Layout
from jemkit.updaters import UpdaterSpec

log = logging.getLogger(__name__)


Select = Literal["pgd10", "accuracy"]
"""The accuracy on validation images by which the best epoch is selected."""


class Run(Options):
    """Length, seed, device and other options of training."""

    epochs: int = Field(100, ge=1)  # passes over the training images
    batch_size: int = Field(128, ge=1)  # images per update, over all processes
    micro_batch: int = Field(0, ge=0)  # maximum images per forward pass; 0: no limit
    recompute: bool = False  # activation checkpointing in updates: half the memory
    seed: int = Field(0, ge=0, lt=2**32)  # of weights, batches, chains and attacks
    theta_steps: int = Field(1, ge=1)  # M_theta: updates per draw
    valid_fraction: float = Field(0.1, gt=0, lt=1)  # share of training images set aside
    max_train: int | None = Field(None, ge=2)  # use only this many images of the training split
    ema_decay: float = Field(0.0, ge=0, lt=1)  # decay of the EMA of the weights; 0: none
    ema_warmup: bool = False  # a decay of at most (1 + n) / (10 + n) after n updates
    ema_copy: float = Field(0.0, ge=0, le=1)  # share of the run in which the average is a copy
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # bf16: autocast; tf32: on CUDA
    compile: bool = False  # torch.compile the gradients of chains and attacks
    channels_last: Layout = "auto"  # the memory format; auto: a fixed rule
    deterministic: bool = False  # only deterministic algorithms of torch
    threads: int | None = Field(None, ge=1, le=4096)  # of the CPU; None: torch's own choice
    eval_images: int = Field(256, ge=1)  # validation images for PGD-10 after each epoch
    select: Select = "pgd10"  # what selects the best epoch on validation
    test_images: int | None = Field(None, ge=1)  # of the final evaluation; None: 1,000 or more
    shard: bool = False  # with torchrun: FSDP-sharded weights
    keep: int = Field(2, ge=1)  # newest checkpoints to keep, besides the best and the sentinel's

    def unused(self) -> dict[str, str]:
        idle = {} if self.ema_warmup else {"ema_copy": "without ema_warmup"}
        return idle if self.ema_decay else {**idle, "ema_warmup": "where ema_decay is 0"}

    @property
    def layout(self) -> Layout:
        """`channels_last` as it applies: FSDP-sharded weights are contiguous."""
        return "no" if self.shard else self.channels_last


TrackerName = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")]
"""The name of a tracker in a recipe; the file of what it keeps has this name."""


class Recipe(Options):
    """Everything that determines a run."""

    run: Run
    data: Annotated[Dataset, PartOf("dataset")]
    backbone: Annotated[BackboneSpec, PartOf("backbone")]
    objective: Annotated[Objective[Any] | ObjectiveSpec, PartOf("objective")]
    updater: Annotated[UpdaterSpec, PartOf("updater")]
    optimizer: OptimizerOptions
    schedule: Schedule
    sentinel: Sentinel = Sentinel()
    extra: Extra = Extra()
    trackers: dict[TrackerName, Annotated[TrackerSpec, PartOf("tracker")]] = {}

    @field_validator("trackers", mode="before")
    @classmethod
    def _switched_on(cls, tables: Any) -> Any:
        """The tables of trackers that are not false."""
        if not isinstance(tables, Mapping):
            return tables
        return {name: table for name, table in tables.items() if table is not False}

    def unused(self) -> dict[str, str]:
        attacks = (
            f"{path}.batch_norm"
            for path, part in parts_of(self.objective, "objective")
            if isinstance(part, HasBatchNormMode)
        )
        network = getattr(self.backbone, "network", None)
        idle = {} if network is None else without_batch_norm(
            network, [*attacks, "optimizer.decay_norms"]
        )  # fmt: skip
        return {**idle, **self._unused_views()} if hasattr(self.backbone, "views") else idle

    def _unused_views(self) -> dict[str, str]:
        """Options of the views without effect on this data set, or without a density."""
        views: dict[str, str] = {}
        with suppress(DataError):  # a property of another package's data set may read files
            if self.data.augmentation == Augmentation():
                views |= dict.fromkeys(AUGMENT, "on this data set, which has no augmentation")
        has_density = getattr(self.backbone, "has_density", True)
        if not has_density and not getattr(self.objective, "two_views", False):
            views |= dict.fromkeys(DENSITY_VIEW, "on a classifier, which has no density")
        return views


AUGMENT = ("backbone.views.augment_x", "backbone.views.augment_pos")
DENSITY_VIEW = tuple(
    f"backbone.views.{option}" for option in ("augment_pos", "noise_pos", "pos_share")
)
"""Options of the density's view, which an objective with `two_views` uses without a density."""


class Resolved(NamedTuple):
    """A recipe, its tables, and the origin of each value."""

    recipe: Recipe
    tables: Table
    origins: dict[str, str]  # dotted key: origin


DEFAULT_NAMES = {"data": "digits", "backbone": "sadajem", "objective": "ebjdat", "updater": "plain"}


def resolve(
    registry: Registry,
    *,
    preset: str | None = None,
    config: Path | Table | None = None,
    overrides: Iterable[str] = (),
    named: Table | None = None,
    base: Path | None = None,
) -> Resolved:
    """Merge the layers: defaults < data < backbone < objective < preset < config < --set < named.

    A part selected by a named option is selected before --set, which may then set its options.
    Settings of a part that a later layer replaces are dropped, with a warning. The saved config
    `base` of a run comes before the preset.
    """
    own = [*_config(base), *_preset(registry, preset), *_untracked(_config(config))]
    own.append(Layer("option", choices(named or {})))
    own += override_layers(overrides)
    own.append(Layer("option", named or {}))
    for layer in own:
        _check_tables(layer)
    parts = {
        "run": Run(), "schedule": Schedule(), "optimizer": SGD(), "sentinel": Sentinel(),
        "extra": Extra(),
    }  # fmt: skip
    stack = Stack(registry)
    stack.lay(Layer("default", {k: v.model_dump(mode="json") for k, v in parts.items()}))
    picked = {table: _choice(table, own) for table in PARTS}
    names = {table: str(layer.table[table]["use"]) for table, layer in picked.items()}
    _check_whole(own, picked)
    proposed = [*picked.values(), *_part_layers(registry, names)]
    usual: Table = {}
    for at, layer in enumerate([*proposed, *own]):
        if at == len(proposed):
            usual = copy.deepcopy(stack.tables)
        replaced = _replaced(layer, picked)
        for table in replaced:
            stack.lose(layer.origin, PARTS[table], table, layer.table[table])
        rest = {name: table for name, table in layer.table.items() if name not in replaced}
        stack.lay(layer._replace(table=rest))
    _log_lost(stack, own)
    recipe = build(stack.tables, registry, stack.origins)
    paths = [path for path in (base, config) if isinstance(path, Path)]
    saved = {str(path) for path in paths if path.suffix.lower() == ".json"}  # as a run saved them
    said = {layer.origin for layer in own} - saved
    check_unused(recipe, stack.tables, usual, stack.origins, said)
    return Resolved(recipe, stack.tables, stack.origins)


def build(tables: Table, registry: Registry, origins: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of complete tables, such as a run's saved config."""
    try:
        recipe = Recipe.model_validate(tables, context=registry.context)
    except ValidationError as error:
        raise ConfigError(explain(error, tables, origins)) from None
    if isinstance(recipe.objective, NamesStreams) and not recipe.objective.streams:
        raise ConfigError(
            f"objective: every weight of {tables['objective']['use']} is 0: nothing to learn. Set "
            "one above 0"
        )
    return recipe


def complete(resolved: Resolved, registry: Registry) -> Resolved:
    """The same with every default written out, to be saved and loaded again."""
    tables = resolved.recipe.model_dump(mode="json", context=registry.context)
    origins = {key: resolved.origins.get(key, "default") for key, _ in flat(tables)}
    return Resolved(resolved.recipe, tables, origins)


def with_run(resolved: Resolved, **options: Any) -> Resolved:
    """The same recipe with other options of the run; the tables are unchanged."""
    run = resolved.recipe.run.model_copy(update=options)
    return resolved._replace(recipe=resolved.recipe.model_copy(update={"run": run}))


def about_preset(registry: Registry, name: str) -> str:
    """What a preset sets and what it corresponds to: the comment at the start of its file."""
    return leading_comment(_presets(registry).get(name))


def _choice(table: str, own: list[Layer]) -> Layer:
    """The part that the last layer with a choice selects."""
    choice = Layer("default", {table: {"use": DEFAULT_NAMES[table]}})
    for layer in own:
        part = layer.table.get(table, {})
        if "use" in part:
            choice = Layer(layer.origin, {table: {"use": str(part["use"])}})
    return choice


def _check_whole(own: list[Layer], picked: Mapping[str, Layer]) -> None:
    """Reject a preset whose own backbone or objective a later layer replaces."""
    for layer in own:
        name = layer.origin.removeprefix("preset/")
        for table in PARTS if name != layer.origin else ():
            use, other = layer.table.get(table, {}).get("use"), picked[table].table[table]["use"]
            if use is not None and use != other:
                raise ConfigError(
                    f"the preset {name} is of the {table} {use}, and {other} is "
                    f"chosen{spoken(picked[table].origin)}: a preset needs its own [{table}]. "
                    f"Omit --preset {name}, or use its {table}"
                )


def _replaced(layer: Layer, picked: Mapping[str, Layer]) -> list[str]:
    """The tables of a layer that belong to another part than the one finally selected."""
    final = {k: c.table[k]["use"] for k, c in picked.items() if c.origin != "default"}
    return [k for k, use in final.items() if layer.table.get(k, {}).get("use", use) != use]


def _log_lost(stack: Stack, own: list[Layer]) -> None:
    """Warn of settings of a preset, file or option that are dropped, since their part was
    replaced."""
    for origin in dict.fromkeys(layer.origin for layer in own if layer.origin != "option"):
        lost = [f"{key} = {value!r}" for came, key, value in stack.lost if came == origin]
        if lost:
            log.warning(
                "%s: dropped, since another part was selected later: %s%s",
                origin,
                ", ".join(lost[:5]),
                f" and {len(lost) - 5} more" if len(lost) > 5 else "",
            )


def _part_layers(registry: Registry, names: Mapping[str, str]) -> list[Layer]:
    """The layers that the plug-ins provide for these parts."""
    data, backbone, objective = names["data"], names["backbone"], names["objective"]
    keys = (
        f"data/{data}", f"backbone/{backbone}", f"backbone/{backbone}/{data}",
        f"objective/{objective}", f"run/{backbone}/{objective}", f"objective/{objective}/{data}",
        f"run/{backbone}/{objective}/{data}",
    )  # fmt: skip
    layers = [Layer(k, read_layer(registry.recipes[k])) for k in keys if k in registry.recipes]
    for layer in layers:
        _check_tables(layer)
    return layers


def _presets(registry: Registry) -> dict[str, Any]:
    return {
        key.removeprefix("preset/"): source
        for key, source in registry.recipes.items()
        if key.startswith("preset/")
    }


def _preset(registry: Registry, name: str | None) -> list[Layer]:
    if name is None:
        return []
    presets = _presets(registry)
    if name not in presets:
        there = ", ".join(sorted(presets))
        raise ConfigError(f"no preset {name!r}{nearest(name, presets)}. There are: {there}")
    return [Layer(f"preset/{name}", read_layer(presets[name]))]


def _config(config: Path | Table | None) -> list[Layer]:
    if config is None:
        return []
    return [Layer(str(config) if isinstance(config, Path) else "config", read_layer(config))]


def _untracked(layers: list[Layer]) -> list[Layer]:
    """Layers without the trackers of a saved config, which are those of its own run alone."""
    return [
        layer._replace(table={k: v for k, v in layer.table.items() if k != "trackers"})
        if layer.origin.lower().endswith(".json") else layer
        for layer in layers
    ]  # fmt: skip


def _check_tables(layer: Layer) -> None:
    for name, table in layer.table.items():
        if name not in Recipe.model_fields:
            tables = ", ".join(Recipe.model_fields)
            raise ConfigError(
                f"{layer.origin}: unknown table [{name}]{nearest(name, Recipe.model_fields)}. "
                f"There are: {tables}"
            )
        if not isinstance(table, dict):
            raise ConfigError(f"{layer.origin}: {name} = {table!r}; expected a table [{name}]")


def schema(registry: Registry) -> Table:
    """The JSON schema of a recipe, and of every part that it can name."""
    parts = {
        kind: {name: part_schema(part, registry) for name, part in registry[kind].items()}
        for kind in registry.shelves
    }
    return {"recipe": Recipe.model_json_schema(), "parts": parts}


def part_schema(part: type[Options], registry: Registry) -> Table:
    """The JSON schema of a part's options, with defaults as in a recipe."""
    schema = part.model_json_schema()
    for name, default in part_defaults(part, registry).items():
        schema["properties"][name]["default"] = default
    return schema
