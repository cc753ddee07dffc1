"""Names to parts: the registry and the guarded loader of plug-ins."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, entry_points
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import pluggy
from pydantic import JsonValue, TypeAdapter, ValidationError

from jemkit.config.probing import Guest, Refused, contained, lethal
from jemkit.errors import ConfigError, UnknownName
from jemkit.hookspecs import API, HOOKS, KINDS, SPECS
from jemkit.options import example, in_name, nearest, pattern

T = TypeVar("T")


class Offer(NamedTuple):
    """One part as one plug-in registers it."""

    kind: str
    name: str
    part: type[Any]
    distribution: str
    version: str


class Fault(NamedTuple):
    """A plug-in, or a part of one, that was skipped, and why."""

    plugin: str
    distribution: str
    version: str
    reason: str


class Shelf(Generic[T], Mapping[str, type[T]]):
    """The parts of one kind."""

    def __init__(self, kind: str, offers: list[Offer]) -> None:
        self.kind = kind
        self._offers: dict[str, Offer] = {}
        for offer in offers:
            other = self._offers.get(offer.name)
            if other is not None:
                raise ConfigError(
                    f"two plug-ins provide the {kind} {offer.name!r}: "
                    f"{other.part.__module__} of {other.distribution} and "
                    f"{offer.part.__module__} of {offer.distribution}; uninstall one of them, "
                    "or use --no-plugins"
                )
            self._offers[offer.name] = offer

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._offers:
            word, dash, values = name.partition("-")
            hint = nearest(name, self) or nearest(word, self, dash + values)
            there = ", ".join(pattern(self[known], known) for known in self)
            raise UnknownName(f"no {self.kind} {name!r}{hint}. There are: {there}")
        return self._offers[name].part

    def __contains__(self, name: object) -> bool:
        return name in self._offers

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._offers))

    def __len__(self) -> int:
        return len(self._offers)

    def named(self, name: str) -> tuple[type[T], dict[str, str]]:
        """A part, and the options in its name: `wrn-28-10` is wrn with depth 28 and width 10."""
        word = name.partition("-")[0]
        if name in self._offers or word not in self._offers:
            return self[name], {}
        part = self[word]
        options = in_name(part, name)
        if options is None:
            hint = nearest(name, self._offers.keys() - {word})
            expected = f"the pattern is {pattern(part, word)}{example(part, word)}"
            raise ConfigError(f"{name!r} does not name a {self.kind}{hint}; {expected}")
        return part, options

    def name_of(self, part: type[Any]) -> str:
        for name, offer in self._offers.items():
            if offer.part is part:
                return name
        raise UnknownName(f"{part.__name__} is not a registered {self.kind}")

    def offers(self) -> list[Offer]:
        return [self._offers[name] for name in self]


@dataclass(frozen=True)
class Registry:
    """All parts that the installed plug-ins register; immutable."""

    shelves: Mapping[str, Shelf[Any]]
    recipes: Mapping[str, Any]
    faults: list[Fault] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)  # plug-ins whose import is slow, and how slow

    def __getitem__(self, kind: str) -> Shelf[Any]:
        return self.shelves[kind]

    @property
    def context(self) -> dict[str, Any]:
        """What pydantic needs to resolve the parts of a table."""
        return {"registry": self}


class Plugin(NamedTuple):
    """A loaded plug-in module and where it came from."""

    name: str
    module: Any
    distribution: str = "(local)"
    version: str = ""


def registry_of(plugins: list[Plugin], faults: list[Fault] | None = None) -> Registry:
    """The registry of these plug-ins, in any order; an invalid one is skipped and recorded as a
    fault."""
    faults = list(faults or [])
    offers: dict[str, list[Offer]] = {kind: [] for kind in KINDS}
    recipes: dict[str, tuple[Any, Plugin]] = {}
    for plugin in sorted(plugins, key=lambda p: (p.distribution, p.name)):
        try:
            with contained():
                offered, layers = _taken_in(plugin)
        except Refused as error:  # whatever one plug-in raises, the others are kept
            faults.append(Fault(plugin.name, plugin.distribution, plugin.version, str(error)))
            continue
        for offer in offered:
            offers[offer.kind].append(offer)
        for key, layer in layers.items():
            if key in recipes:
                raise ConfigError(
                    f"two plug-ins provide the recipe {key!r}: {recipes[key][1].name} of "
                    f"{recipes[key][1].distribution} and {plugin.name} of {plugin.distribution}; "
                    "uninstall one of them, or use --no-plugins"
                )
            recipes[key] = layer, plugin
    shelves = {kind: Shelf[Any](kind, of_kind) for kind, of_kind in offers.items()}
    return Registry(shelves, {key: layer for key, (layer, _) in recipes.items()}, faults)


def _taken_in(plugin: Plugin) -> tuple[list[Offer], dict[str, Any]]:
    """All parts of one plug-in, checked; an error of any part rejects all of them."""
    manager = pluggy.PluginManager("jemkit")
    manager.add_hookspecs(SPECS)
    manager.register(plugin.module)
    _check_hook_names(plugin.module)
    manager.check_pending()
    offers = []
    for kind, (hook, *_) in KINDS.items():
        for name, part in _given(manager, hook, "classes").items():
            _check_part(kind, name, part)
            offers.append(Offer(kind, name, part, plugin.distribution, plugin.version))
    layers = _given(manager, "jemkit_recipes", "layers")
    for key, layer in layers.items():
        _check_layer(key, layer)
    return offers, layers


def _given(manager: pluggy.PluginManager, hook: str, what: str) -> dict[Any, Any]:
    """The result of a plug-in's hook; pluggy itself would omit None."""
    merged: dict[Any, Any] = {}
    for hooked in getattr(manager.hook, hook).get_hookimpls():
        mapping = hooked.function()
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{hook} returned {mapping!r}; expected a mapping of names to {what}")
        merged |= mapping
    return merged


LAYERS = ("data", "backbone", "objective", "run", "preset", "scale", "study")
"""What a recipe layer may apply to; `jemkit.hookspecs` explains it."""


TABLES = TypeAdapter(dict[str, dict[str, JsonValue]])


def _check_layer(key: Any, layer: Any) -> None:
    name, _, rest = str(key).partition("/")
    if name not in LAYERS or not rest:
        wanted = ", ".join(f"{name}/..." for name in LAYERS)
        raise TypeError(f"a recipe layer belongs to {key!r}; expected one of {wanted}")
    if isinstance(layer, Path):
        if not layer.is_file():
            raise TypeError(f"the recipe layer {key!r} is the file {layer}, which is missing")
        return
    try:
        TABLES.validate_python(layer)
    except ValidationError:
        raise TypeError(
            f"the recipe layer {key!r} is {layer!r}; expected a Path, or tables such as "
            "{'run': {'epochs': 10}}"
        ) from None


def _check_hook_names(module: Any) -> None:
    for name in dir(module):
        attribute = getattr(module, name)
        if not name.startswith("jemkit_") or not callable(attribute):
            continue
        if name not in HOOKS:
            raise TypeError(f"{name} is not a hook of jemkit{nearest(name, HOOKS)}")
        if not hasattr(attribute, "jemkit_impl"):  # the mark that pluggy sets
            raise TypeError(f"{name} is not marked as a hook; write @hookimpl above it")


def _check_part(kind: str, name: str, part: Any) -> None:
    word = isinstance(name, str) and name == name.lower() and name.replace("_", "").isalnum()
    if not word:
        raise TypeError(f"the {kind} name {name!r} is not one lower-case word")
    if not isinstance(part, type):
        raise TypeError(f"the {kind} {name!r} is {part!r}; expected a class")
    missing = [need for need in KINDS[kind].needs if not _has(part, need)]
    if kind == "objective" and not ({"draw", "loss"} <= set(dir(part)) or hasattr(part, "build")):
        missing.append("draw and loss, or build")
    if kind == "attack" and not (hasattr(part, "draw") or hasattr(part, "bind")):
        missing.append("draw, or bind")
    if not hasattr(part, "model_fields"):
        missing.append("options (make it a subclass of jemkit.Options)")
    if missing:
        raise TypeError(f"the {kind} {name!r} ({part.__qualname__}) lacks {', '.join(missing)}")


def _has(part: type[Any], attribute: str) -> bool:
    return hasattr(part, attribute) or attribute in getattr(part, "model_fields", {})


def installed(*, third_party: bool = True) -> Registry:
    """The registry of all installed plug-ins; or of the built-in ones alone."""
    plugins: list[Plugin] = []
    faults: list[Fault] = []
    slow: list[str] = []
    distinct = set(entry_points(group="jemkit"))  # an editable install may list its own twice
    ordered = sorted(distinct, key=lambda entry: (entry.name, entry.value))
    origin = cache(_origin)  # parses a distribution's metadata once, not for each of its plug-ins
    entries = [Guest(entry, *origin(entry.dist)) for entry in ordered]
    own = [plugin for plugin in entries if plugin.distribution == OURS]
    guests = [plugin for plugin in entries if plugin.distribution != OURS] if third_party else []
    declared = {origin(entry.dist)[0]: entry.name for entry in entry_points(group="jemkit_api")}
    for plugin in [g for g in guests if declared.get(g.distribution, str(API)) != str(API)]:
        guests.remove(plugin)
        number = declared[plugin.distribution]
        why = f"is written for API {number}, and this is API {API}: install a version for API {API}"
        faults.append(Fault(plugin.entry.name, plugin.distribution, plugin.version, why))
    verdicts = [""] * len(own) + lethal(guests)
    for (entry, whose, version), verdict in zip([*own, *guests], verdicts, strict=True):
        began = time.monotonic()
        try:
            if verdict:
                raise Refused(verdict)
            with contained():
                module = entry.load()
        except Refused as error:
            why = f"is not imported: {error}" if verdict else f"cannot be imported: {error}"
            faults.append(Fault(entry.name, whose, version, why))
            continue
        plugins.append(Plugin(entry.name, module, whose, version))
        spent = time.monotonic() - began
        if whose != OURS and spent > SLOW:
            named = f"{entry.name!r} of {whose} {version}".rstrip()
            slow.append(f"plug-in {named} took {spent:.0f} s to import")
    registry = registry_of(plugins, faults)
    return Registry(registry.shelves, registry.recipes, registry.faults, slow)


OURS = "jemkit"
SLOW = 5.0  # seconds after which a plug-in's import is reported as slow; each command waits for it


def _origin(dist: Distribution | None) -> tuple[str, str]:
    """The name of a distribution, and its version, as far as its metadata contain them."""
    try:
        name, version = (dist.name, dist.version) if dist else (None, None)
    except Exception:  # metadata that are damaged
        name = version = None
    return str(name or "(unknown)"), str(version or "")
