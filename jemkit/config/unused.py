"""Options without effect given the others: rejected if a user has set them."""

import copy
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
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
    for key, value, needs in _idle(recipe, tables):
        before = dict(_leaves(key, _at(usual, key)))
        for leaf, now in _leaves(key, value):
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


def before_layers(tables: Table) -> Table:
    """A copy of tables as they stand, for `check_unused`."""
    return copy.deepcopy(tables)


def _idle(recipe: Options, tables: Table) -> Iterator[tuple[str, Any, str]]:
    """Dotted keys of options without effect, their values and what they would need."""
    for path, part in parts_of(recipe):
        for name, needs in part.unused().items():
            key = f"{path}.{name}"
            yield key, _at(tables, key), needs


def _at(tables: Table, key: str) -> Any:
    *where, name = key.split(".")
    return table_at(tables, where).get(name)


def _leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    return flat(value, f"{key}.") if isinstance(value, dict) else [(key, value)]
