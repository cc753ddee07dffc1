"""Recipes: layers of TOML tables, merged with the origin of every value, made into parts."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from jemkit.backbone import BackboneSpec
from jemkit.data import Dataset
from jemkit.errors import ConfigError
from jemkit.objective import Objective, ObjectiveSpec
from jemkit.options import Options, PartOf, nearest
from jemkit.registry import Registry
from jemkit.schedule import SGD, Adam, OptimizerOptions, Schedule
from jemkit.update import UpdaterSpec

Table = dict[str, Any]
PARTS = {"data": "dataset", "backbone": "backbone", "objective": "objective", "updater": "updater"}
"""The tables that name a part, and the kind of that part."""


class Run(Options):
    """How long, from which seed and on what a run is trained."""

    epochs: int = Field(100, ge=1)
    batch_size: int = Field(128, ge=1)
    seed: int = Field(0, ge=0)
    theta_steps: int = Field(1, ge=1)  # M_theta
    valid_fraction: float = Field(0.1, gt=0, lt=1)
    max_train: int | None = Field(None, ge=2)  # use this many images of the training split
    ema_decay: float = Field(0.0, ge=0, lt=1)  # 0: no average of the weights
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    compile: bool = False
    channels_last: Literal["auto", "yes", "no"] = "auto"
    deterministic: bool = False
    eval_images: int = Field(256, ge=1)  # of validation, under PGD-10 after each epoch
    keep: int = Field(2, ge=1)  # newest checkpoints to keep, beside the best


class Recipe(Options):
    """Everything that determines a run."""

    run: Run
    data: Annotated[Dataset, PartOf("dataset")]
    backbone: Annotated[BackboneSpec, PartOf("backbone")]
    objective: Annotated[Objective[Any] | ObjectiveSpec, PartOf("objective")]
    updater: Annotated[UpdaterSpec, PartOf("updater")]
    optimizer: OptimizerOptions
    schedule: Schedule


class Layer(NamedTuple):
    """One source of settings."""

    origin: str
    table: Table


class Resolved(NamedTuple):
    """A recipe, the tables that it was made of, and where each value came from."""

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
) -> Resolved:
    """Merge the layers: defaults < data < backbone < objective < preset < config < --set < named."""
    above = [*_preset(registry, preset), *_config(config)]
    above += [Layer(f"--set {text}", _override(text)) for text in overrides]
    above.append(Layer("option", named or {}))
    names = {table: _name(table, above) for table in PARTS}
    base = [Layer("default", _defaults(registry, "run", "schedule", "optimizer"))]
    base += _part_layers(registry, names)
    names = {table: _name(table, [*base, *above], names[table]) for table in PARTS}
    merged: Table = {}
    origins: dict[str, str] = {}
    base += [Layer("default", {table: {"use": name}}) for table, name in names.items()]
    for layer in [*base, *above]:
        _check_tables(layer)
        merge(merged, layer.table, layer.origin, origins, registry)
    return Resolved(build(merged, registry), merged, origins)


def build(tables: Table, registry: Registry) -> Recipe:
    """The recipe of complete tables, such as a run's saved config."""
    try:
        return Recipe.model_validate(tables, context=registry.context)
    except ValidationError as error:
        raise ConfigError(explain(error, tables)) from None


def complete(resolved: Resolved, registry: Registry) -> Resolved:
    """The same with every default written out, so that it can be saved and fed back."""
    tables = resolved.recipe.model_dump(mode="json", context=registry.context)
    origins = {key: resolved.origins.get(key, "default") for key, _ in flat(tables)}
    return Resolved(resolved.recipe, tables, origins)


def _part_layers(registry: Registry, names: Mapping[str, str]) -> list[Layer]:
    """What the plug-ins propose for these parts."""
    data, backbone, objective = names["data"], names["backbone"], names["objective"]
    keys = (
        f"data/{data}",
        f"backbone/{backbone}",
        f"backbone/{backbone}/{data}",
        f"objective/{objective}",
        f"objective/{objective}/{data}",
    )
    return [
        Layer(key, read_layer(registry.recipes[key])) for key in keys if key in registry.recipes
    ]


def _preset(registry: Registry, name: str | None) -> list[Layer]:
    if name is None:
        return []
    presets = {k.removeprefix("preset/"): v for k, v in registry.recipes.items() if "preset/" in k}
    if name not in presets:
        raise ConfigError(
            f"no preset {name!r}{nearest(name, presets)}. There are: {', '.join(sorted(presets))}"
        )
    return [Layer(f"preset/{name}", read_layer(presets[name]))]


def _config(config: Path | Table | None) -> list[Layer]:
    if config is None:
        return []
    if isinstance(config, Path):
        return [Layer(str(config), read_layer(config))]
    return [Layer("config", config)]


def read_layer(source: Path | Mapping[str, Any]) -> Table:
    """A TOML file, a run's saved config (JSON), or a table as it is."""
    if not isinstance(source, Path):
        return json.loads(json.dumps(source))  # type: ignore[no-any-return]
    try:
        text = source.read_text(encoding="utf-8")
        table = json.loads(text) if source.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{source} is missing") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} cannot be read as a recipe: {error}") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{source} holds no table")
    return table.get("recipe", table)  # type: ignore[no-any-return]


def _override(text: str) -> Table:
    """`a.b=VALUE`; VALUE is TOML, or else a plain string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: wanted KEY=VALUE, such as optimizer.lr=0.01")
    try:
        return tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
        try:
            return tomllib.loads(f"{key} = {json.dumps(value)}")
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"--set {text!r} is not KEY=VALUE: {error}") from None


def _name(table: str, layers: list[Layer], default: str | None = None) -> str:
    """The part that the last layer with an opinion names."""
    name = default or DEFAULT_NAMES[table]
    for layer in layers:
        part = layer.table.get(table)
        if isinstance(part, dict) and "use" in part:
            name = part["use"]
    if not isinstance(name, str):
        raise ConfigError(f"{table}.use = {name!r}: wanted a name")
    return name


def _check_tables(layer: Layer) -> None:
    for name, table in layer.table.items():
        if name not in Recipe.model_fields:
            tables = ", ".join(Recipe.model_fields)
            raise ConfigError(
                f"{layer.origin}: unknown table [{name}]{nearest(name, Recipe.model_fields)}. "
                f"There are: {tables}"
            )
        if not isinstance(table, dict):
            raise ConfigError(f"{layer.origin}: {name} = {table!r}; wanted a table [{name}]")


def _defaults(registry: Registry, *tables: str) -> Table:
    found: Table = {"run": Run(), "schedule": Schedule(), "optimizer": SGD()}
    return {name: found[name].model_dump(mode="json") for name in tables}


def part_defaults(part: type[Options], registry: Registry) -> Table:
    """A part's default options as a table; options without a default are left out."""
    known = {n: f.default for n, f in part.model_fields.items() if not f.is_required()}
    whole = part.model_construct(**known)
    dumped = whole.model_dump(mode="json", context=registry.context, include=set(known))
    return {name: dumped[name] for name in known}


def merge(
    into: Table, new: Mapping[str, Any], origin: str, origins: dict[str, str], registry: Registry
) -> None:
    """Lay `new` over `into`. A table whose `use` changes begins again from that part's defaults."""
    for name, table in new.items():
        _merge_part(into, name, table, origin, origins, registry, PARTS.get(name), name)


def _merge_part(
    into: Table,
    key: str,
    new: Any,
    origin: str,
    origins: dict[str, str],
    registry: Registry,
    kind: str | None,
    path: str,
) -> None:
    if not isinstance(new, dict):
        into[key] = new
        origins[path] = origin
        return
    old = into.get(key)
    if "use" in new and (not isinstance(old, dict) or _other(old, new["use"], registry, kind)):
        old = _fresh(new["use"], registry, kind, key)
        for stale in [k for k in origins if k == path or k.startswith(f"{path}.")]:
            del origins[stale]
        origins |= {f"{path}.{k}": "default" for k, _ in flat(old)}
    into[key] = target = dict(old) if isinstance(old, dict) else {}
    for name, value in new.items():
        if name == "use" and "use" in target and kind and value != target["use"]:
            value = target["use"]  # the name in a pattern such as wrn-28-10 is spelt out
        sub = _part_kind(target, name, registry, kind)
        _merge_part(target, name, value, origin, origins, registry, sub, f"{path}.{name}")


def _fresh(use: Any, registry: Registry, kind: str | None, key: str) -> Table:
    """The defaults of a newly chosen part."""
    if key == "optimizer":
        names = {"sgd": SGD, "adam": Adam, "adamw": Adam}
        if use not in names:
            raise ConfigError(
                f"no optimizer {use!r}{nearest(use, names)}. There are: adam, adamw, sgd"
            )
        return {**names[use]().model_dump(mode="json"), "use": use}
    if kind is None:
        return {"use": use}
    part, named = registry[kind].named(str(use))
    return {"use": registry[kind].name_of(part), **part_defaults(part, registry), **_typed(named)}


def _other(old: Table, use: Any, registry: Registry, kind: str | None) -> bool:
    """Whether `use` names another part than the table has, or spells out new options."""
    if kind is None:
        return bool(old.get("use") != use)
    part, named = registry[kind].named(str(use))
    return bool(named) or registry[kind].name_of(part) != old.get("use")


def _typed(named: Mapping[str, str]) -> Table:
    return {k: int(v) if v.isdigit() else v for k, v in named.items()}


def _part_kind(target: Table, name: str, registry: Registry, kind: str | None) -> str | None:
    """The kind of part that a field holds, if it holds one."""
    if kind is None or "use" not in target or name == "use":
        return None
    field = registry[kind][target["use"]].model_fields.get(name)
    marks = field.metadata if field is not None else ()
    return next((m.kind for m in marks if isinstance(m, PartOf)), None)


def flat(tables: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values."""
    rows: list[tuple[str, Any]] = []
    for name, value in tables.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows


def explain(error: ValidationError, tables: Mapping[str, Any]) -> str:
    """A line for each mistake: the key, what came, what was wanted, the nearest name."""
    return "\n".join(_line(dict(e), tables) for e in error.errors(include_url=False))


def _line(mistake: dict[str, Any], tables: Mapping[str, Any]) -> str:
    where = [
        str(p) for p in mistake["loc"] if p not in ("sgd", "adam", "adamw", "function-wrap[wrap]")
    ]
    key = ".".join(where)
    if mistake["type"] == "extra_forbidden":
        known = mistake.get("ctx", {}).get("known", ())
        return f"{key}: no such option{nearest(where[-1], known)}"
    message = mistake["msg"].removeprefix("Value error, ")
    came = "" if isinstance(mistake["input"], dict) else f" (got {mistake['input']!r})"
    return f"{key}: {message}{came}"


def schema(registry: Registry) -> Table:
    """The JSON schema of a recipe, and of every part that it can name."""
    parts = {
        kind: {name: part.model_json_schema() for name, part in registry[kind].items()}
        for kind in registry.shelves
    }
    return {"recipe": Recipe.model_json_schema(), "parts": parts}
