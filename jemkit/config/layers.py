"""Layers of settings: TOML tables that override each other, with the origin of every value."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jemkit.config.optim import SGD, Adam
from jemkit.config.registry import Registry
from jemkit.config.retired import current, tracked
from jemkit.errors import ConfigError, DataError, UnknownName
from jemkit.options import Options, PartOf, nearest
from jemkit.runtime.opening import JSON_LIMIT, TOML_LIMIT, read_text

Table = dict[str, Any]
"""A table of settings, as TOML or JSON has it."""
PARTS = {"data": "dataset", "backbone": "backbone", "objective": "objective", "updater": "updater"}
"""The tables that select a part, and its kind."""

TABLES = (*PARTS, "run", "optimizer", "schedule", "sentinel")  # top-level tables of a recipe
DEEPEST = 40  # limit on nested tables; those of a recipe have four levels

OPTIMIZERS: dict[str, type[Options]] = {"sgd": SGD, "adam": Adam, "adamw": Adam}


RETAIN = "retain"  # beside `use`: the options of the previous part that the new one keeps


class Layer(NamedTuple):
    origin: str
    table: Table


class Stack:
    """Merged layers.

    A table whose `use` changes starts from the new part's defaults: it keeps no option of the
    previous part unless the layer names it in `retain`. `lost` lists the settings that were dropped
    this way.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.tables: Table = {}
        self.origins: dict[str, str] = {}  # dotted key: origin
        self.lost: list[tuple[str, str, Any]] = []  # origin, dotted key and value

    def lay(self, layer: Layer) -> None:
        for name, table in tracked(layer.table, layer.origin).items():
            if name == "trackers":
                self._lay_trackers(table, layer.origin)
                continue
            kind = "optimizer" if name == "optimizer" else PARTS.get(name)
            self._lay(self.tables, name, table, layer.origin, kind, name)

    def _lay_trackers(self, tables: Table, origin: str) -> None:
        """Tables of trackers; one without `use` is of the tracker of its name."""
        into = self.tables.setdefault("trackers", {})
        for name, table in tables.items():
            if isinstance(table, dict) and not isinstance(into.get(name), dict):
                table = {"use": name, **table}
            self._lay(into, name, table, origin, "tracker", f"trackers.{name}")

    def of_part(self, kind: str, name: str, options: Table, origin: str) -> Table:
        """All options of one part: its defaults, with these laid over them as in a recipe."""
        tables: Table = {}
        self._lay(tables, name, {"use": name}, "default", kind, name)
        others = {option: value for option, value in options.items() if option != "use"}
        self._lay(tables, name, others, origin, kind, name)
        del tables[name]["use"]
        return {**tables[name], **{k: v for k, v in options.items() if k == "use"}}

    def _lay(
        self, into: Table, key: str, new: Any, origin: str, kind: str | None, path: str
    ) -> None:
        if not isinstance(new, dict):
            into[key] = new
            self._came_from(path, {"": origin})
            return
        target = into[key] if isinstance(into.get(key), dict) else {}
        if kind is not None and "use" in new:
            name, spelt = self.spelt(kind, new["use"], origin)
            names = _retained(new, origin)
            new = {**spelt, **{k: v for k, v in new.items() if k != RETAIN}, "use": name}
            if target.get("use") != name:
                target = self._swapped(kind, path, target, names, new)
        into[key] = target
        for name, value in new.items():
            self._lay(target, name, value, origin, self._kind(kind, target, name), f"{path}.{name}")

    def _swapped(self, kind: str, path: str, before: Table, names: list[str], new: Table) -> Table:
        """The table of a new part: its defaults, and the options that the layer retains."""
        options = self._part(kind, new["use"]).model_fields
        if unknown := [name for name in names if name not in options]:
            raise ConfigError(
                f"{path}.{RETAIN} names {unknown[0]!r}, which is not an option of the {kind} "
                f"{new['use']}{nearest(unknown[0], options)}"
            )
        carried = {name: before[name] for name in names if name in before}
        for origin in sorted({*self.origins.values()} - {"default"}) if "use" in before else ():
            stated = {k: v for k, v in flat(before) if self.origins.get(f"{path}.{k}") == origin}
            self.lose(origin, kind, path, {**stated, "use": before["use"]}, {*carried, *new})
        origins = {f".{key}": self.origins.get(f"{path}.{key}", "default") for key in carried}
        fresh = {**self._fresh(kind, new["use"]), **carried}
        self._came_from(path, {f".{key}": "default" for key, _ in flat(fresh)} | origins)
        return fresh

    def lose(
        self, origin: str, kind: str, path: str, table: Table, but: Iterable[str] = ()
    ) -> None:
        """Record the settings of a layer for a part that another layer replaces, without
        defaults."""
        usual = dict(flat(self._fresh(kind, self.spelt(kind, table["use"], origin)[0])))
        for key, value in flat(table):
            if key not in ("use", *but) and not key.endswith(".use") and usual.get(key) != value:
                self.lost.append((origin, f"{path}.{key}", value))

    def _came_from(self, path: str, origins: Mapping[str, str]) -> None:
        """Replace the origins of the values at `path` by these."""
        below = f"{path}."
        for key in [k for k in self.origins if k == path or k.startswith(below)]:
            del self.origins[key]
        self.origins |= {f"{path}{key}": origin for key, origin in origins.items()}

    def spelt(self, kind: str, use: Any, origin: str) -> tuple[str, Table]:
        """A part's registered name, and the options in its pattern: wrn-16-2 has depth 16."""
        if kind == "optimizer":
            if not isinstance(use, str) or use not in OPTIMIZERS:
                there = ", ".join(sorted(OPTIMIZERS))
                raise UnknownName(
                    f"no optimizer {use!r}{nearest(str(use), OPTIMIZERS)}. "
                    f"There are: {there}{spoken(origin)}"
                )
            return use, {}
        try:
            part, named = self.registry[kind].named(str(use))
        except ConfigError as error:
            raise type(error)(f"{error}{spoken(origin)}") from None
        numbers = {k: int(v) if v.isdecimal() else v for k, v in named.items()}
        return self.registry[kind].name_of(part), numbers

    def _fresh(self, kind: str, name: str) -> Table:
        """The defaults of a newly selected part."""
        return {**part_defaults(self._part(kind, name), self.registry), "use": name}

    def _part(self, kind: str, name: str) -> type[Options]:
        return OPTIMIZERS[name] if kind == "optimizer" else self.registry[kind][name]

    def _kind(self, kind: str | None, table: Table, name: str) -> str | None:
        """The kind of part in a field of this table, if any."""
        if kind is None or kind == "optimizer":
            return None
        field = self.registry[kind][table["use"]].model_fields.get(name)
        marks = field.metadata if field is not None else ()
        return next((mark.kind for mark in marks if isinstance(mark, PartOf)), None)


def _retained(new: Table, origin: str) -> list[str]:
    """The options of the previous part that a layer retains, by name."""
    names = new.get(RETAIN, [])
    if not isinstance(names, list) or "use" in names or not all(isinstance(n, str) for n in names):
        raise ConfigError(
            f"{RETAIN} = {names!r}: expected a list of options of the previous part{spoken(origin)}"
        )
    return names


def spoken(origin: str) -> str:
    """The origin of a mistake, for the end of a message; none for a default."""
    words = {"option": "a named option", "": "", "default": ""}.get(origin, origin)
    return f" (from {words})" if words else ""


def part_defaults(part: type[Options], registry: Registry) -> Table:
    """A part's default options as a table; options without a default are omitted."""
    known = {
        name: field.get_default(call_default_factory=True, validated_data={})
        for name, field in part.model_fields.items()
        if not (field.is_required() or field.exclude)
    }
    whole = part.model_construct(**known)
    dumped = whole.model_dump(mode="json", context=registry.context, include=set(known))
    return {name: dumped[name] for name in known}


def flat(tables: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values."""
    rows: list[tuple[str, Any]] = []
    for name, value in tables.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows


def table_at(tables: Mapping[str, Any], where: Iterable[str]) -> Mapping[str, Any]:
    """The table at a path; an empty one if there is none."""
    for name in where:
        below = tables.get(name)
        tables = below if isinstance(below, dict) else {}
    return tables


def inside(key: str, path: str) -> bool:
    """Whether a dotted key is in the table at `path`."""
    return key.startswith(f"{path}.")


def read_layer(source: Path | Mapping[str, Any]) -> Table:
    """A TOML file, a run's saved config (JSON), or a table as it is."""
    if not isinstance(source, Path):
        try:
            return not_too_deep(json.loads(json.dumps(source)))  # type: ignore[no-any-return]
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"this table is not a recipe: {error}") from None
    try:
        is_json = source.suffix.lower() == ".json"
        text = read_text(source, JSON_LIMIT if is_json else TOML_LIMIT)
        table = not_too_deep(json.loads(text) if is_json else tomllib.loads(text))
    except FileNotFoundError:
        raise DataError(f"{source} is missing; expected a recipe, .toml or .json") from None
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{source} cannot be read as a recipe: {error}") from None
    recipe = table.get("recipe", table) if isinstance(table, dict) else table
    if not isinstance(recipe, dict):
        raise DataError(f"{source} contains no table; expected those of a recipe")
    if recipe is not table and (beside := [n for n in table if _is_table_of_recipe(n, table[n])]):
        raise DataError(
            f"{source}: [{'], ['.join(beside)}] is beside the table `recipe`, where it is "
            f"ignored; put it inside `recipe`"
        )
    return offline(current(recipe)) if is_json else recipe


FETCHING = frozenset({"download", "pretrained"})  # options that allow a part to access the network
TRUE = ("true", "1", "1.0", "yes", "y", "on", "t")  # what pydantic reads as true


def offline(tree: Any) -> Any:
    """The same tables without permissions to download.

    A run's config.json may be untrusted: only an option of the command itself may access the
    network.
    """
    if isinstance(tree, list):
        return [offline(one) for one in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        name: False if name in FETCHING and str(value).lower() in TRUE else offline(value)
        for name, value in tree.items()
    }


def _is_table_of_recipe(name: str, table: Any) -> bool:
    """Whether it belongs inside `recipe`; the `data` beside it describe the run's data."""
    return name in TABLES and (name != "data" or not isinstance(table, dict) or "use" in table)


def not_too_deep(tree: Any, left: int = DEEPEST) -> Any:
    """Parsed TOML or JSON; ValueError if it is nested too deep for a recipe."""
    if not left:
        raise ValueError(f"more than {DEEPEST} tables or lists are nested")
    below = [*tree.values()] if isinstance(tree, dict) else tree
    for value in below if isinstance(below, list) else ():
        not_too_deep(value, left - 1)
    return tree


def override_layers(texts: Iterable[str]) -> list[Layer]:
    """A layer for each KEY=VALUE; those that select a part come before those that set its options.

    So `network.width=8 network.use=smallcnn` means the same in both orders.
    """

    def choice_first(text: str) -> tuple[bool, int]:
        key = text.partition("=")[0].strip()
        return not key.endswith(".use"), key.count(".") if key.endswith(".use") else 0

    ordered = sorted(texts, key=choice_first)
    return [Layer(f"--set {text}", _override(text)) for text in ordered]


def _override(text: str) -> Table:
    """`a.b=VALUE`; VALUE is TOML, or else a plain string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: expected KEY=VALUE, such as optimizer.lr=0.01")
    try:
        try:
            parsed = tomllib.loads(f"{key} = {value}")
        except tomllib.TOMLDecodeError:
            parsed = tomllib.loads(f"{key} = {json.dumps(value, ensure_ascii=False)}")
        return not_too_deep(parsed)  # type: ignore[no-any-return]
    except (ValueError, RecursionError) as error:
        short = text if len(text) < 200 else f"{text[:200]}..."
        raise ConfigError(f"--set {short} is not KEY=VALUE: {error}") from None


def merged(table: Mapping[str, Any], other: Mapping[str, Any]) -> Table:
    """A table with the values of another, also inside its tables."""
    both = {
        name: merged(table[name], value)
        for name, value in other.items()
        if isinstance(value, dict) and isinstance(table.get(name), dict)
    }
    return {**table, **other, **both}


def choices(table: Mapping[str, Any]) -> Table:
    """Only what selects parts: every `use`, in its place."""
    selected: Table = {}
    for name, value in table.items():
        if isinstance(value, dict):
            below = choices(value)
            selected |= {name: below} if below else {}
        elif name == "use":
            selected[name] = value
    return selected


def leading_comment(source: Any) -> str:
    """The comment at the start of a TOML file, as one paragraph; empty for anything else."""
    if not isinstance(source, Path):
        return ""
    words: list[str] = []
    for line in read_text(source).splitlines():
        if not line.startswith("#"):
            break
        words.append(line.lstrip("#").strip())
    return " ".join(words)
