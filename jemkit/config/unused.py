"""Options without effect given the others: rejected if a user has set them."""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jemkit.config.layers import Table, flat, spoken, table_at
from jemkit.errors import ConfigError
from jemkit.options import Options, parts_of

log = logging.getLogger(__name__)


def check_unused(
    recipe: Options, tables: Table, usual: Table, origins: Mapping[str, str], said: Collection[str]
) -> None:
    """Reject options without effect that a layer of `said` sets; warn if a preset sets them.

    `usual` are the tables without any such layer: repeating their values is allowed.
    """
    idle = [
        (f"{path}.{name}".removeprefix("."), needs)
        for path, part in parts_of(recipe)
        for name, needs in part.unused().items()
    ]
    for key, needs in idle:
        before = dict(_leaves(key, usual))
        for leaf, now in _leaves(key, tables):
            origin = origins.get(leaf, "default")
            if origin not in said or before.get(leaf, now) == now:
                continue
            message = f"{leaf} = {now!r} does nothing {needs}{spoken(origin)}"
            if not origin.startswith("preset/"):
                raise ConfigError(f"{message}. Omit it")
            log.warning("%s", message)


def check_given(part: Options, given: Iterable[str], what: str) -> None:
    """Reject options that were set for a part and have no effect given its other options."""
    for name, needs in part.unused().items():
        value, usual = _value_and_default(part, name, what)
        if name.partition(".")[0] in given and value != usual:
            raise ConfigError(f"{what}.{name} = {value!r} does nothing {needs}. Omit it")


def _value_and_default(part: Options, name: str, what: str) -> tuple[Any, Any]:
    """A part's option by its dotted name, and its default."""
    *where, last = name.split(".")
    holder: Any = part
    for key in where:
        holder = getattr(holder, key, None)
    field = getattr(type(holder), "model_fields", {}).get(last)
    if field is None:
        raise ConfigError(
            f"{what}: {type(part).__name__}.unused names {name!r}, which is not one of its "
            "options: an error of its plug-in"
        )
    return getattr(holder, last), field.get_default(call_default_factory=True)


def _leaves(key: str, tables: Table) -> list[tuple[str, Any]]:
    """The values at a dotted key, by their own dotted keys."""
    *where, name = key.split(".")
    value = table_at(tables, where).get(name)
    return flat(value, f"{key}.") if isinstance(value, dict) else [(key, value)]
