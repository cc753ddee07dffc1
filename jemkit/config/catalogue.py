"""The options of a part as a reference shows them: type, bounds, default, meaning."""

import ast
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from jemkit.config.recipe import part_schema
from jemkit.config.registry import Registry
from jemkit.options import Options, not_a_fraction

SIGNS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


class Option(NamedTuple):
    """One option of a part."""

    name: str  # dotted if it is in a table of the part: buffer.capacity
    type: str
    bounds: str  # "> 0, ≤ 1"; empty without bounds
    required: bool
    default: Any  # as in a recipe; None if it is required or not set
    meaning: str  # the comment behind or above the field; empty without one


def options_of(part: type[Options], registry: Registry) -> list[Option]:
    """Every option of a part, in the order of its fields."""
    schema = part_schema(part, registry)
    return list(_options(part, schema, schema.get("$defs", {}), ""))


def _options(
    part: type[Options], schema: Mapping[str, Any], defs: Mapping[str, Any], prefix: str
) -> Iterator[Option]:
    required, meanings = schema.get("required", []), comments(part)
    for name, field in schema.get("properties", {}).items():
        kind = part.model_fields[name].annotation
        meaning = meanings.get(name, "")
        default = field.get("default")
        if isinstance(kind, type) and issubclass(kind, Options):
            table = defs[field["$ref"].rpartition("/")[2]]
            for inner in _options(kind, table, defs, f"{prefix}{name}."):
                key = inner.name.removeprefix(f"{prefix}{name}.")
                yield inner._replace(default=(default or {}).get(key, inner.default))
            continue
        bounds = "0, or ≥ 1" if _is_radius(part, name) else bounds_of(field)
        yield Option(prefix + name, type_of(field), bounds, name in required, default, meaning)


def _is_radius(part: type[Options], name: str) -> bool:
    field = part.model_fields[name]
    return any(not_a_fraction.__name__ in repr(one) for one in (field.annotation, field.metadata))


def type_of(field: Mapping[str, Any]) -> str:
    """A field's type in a few words, from its JSON schema."""
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "anyOf" in field:
        return " | ".join(type_of(choice) for choice in field["anyOf"])
    if "$ref" in field:
        return "table"
    use = field.get("properties", {}).get("use", {})
    words = str(use.get("description", "")).removeprefix("the name of a ")
    return words or str(field.get("type", field.get("const", "any")))


def bounds_of(field: Mapping[str, Any]) -> str:
    """A number's bounds, or those of the numbers in a list: "≥ 0, < 1"."""
    choices = [field, *field.get("anyOf", ()), *([field["items"]] if "items" in field else ())]
    shown = [f"{sign} {one[key]:g}" for one in choices for key, sign in SIGNS.items() if key in one]
    nested = [bounds_of(choice) for choice in choices[1:] if "items" in choice or "anyOf" in choice]
    return ", ".join(dict.fromkeys([*shown, *filter(None, nested)]))


def shown(default: Any, registry: Registry) -> str:
    """A default as TOML would have it; a part shows only what differs from its own defaults."""
    if isinstance(default, Mapping) and "use" in default:
        kinds = [shelf for shelf in registry.shelves.values() if default["use"] in shelf]
        usual: dict[str, Any] = {}
        for shelf in kinds:
            fields = {o.name: o.default for o in options_of(shelf[default["use"]], registry)}
            if set(default) - {"use"} <= set(fields):
                usual = fields
        rest = {k: v for k, v in default.items() if k != "use" and usual.get(k, ...) != v}
        inner = ", ".join(f"{k} = {shown(v, registry)}" for k, v in rest.items())
        return f"{default['use']} ({inner})" if inner else str(default["use"])
    if default is None:
        return "not set"
    return default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)


@cache
def comments(part: type[Options]) -> dict[str, str]:
    """The comment of each field of an options class; that of a base class where it has none."""
    collected: dict[str, str] = {}
    for base in reversed(part.__mro__):
        if issubclass(base, Options) and base is not Options:
            own = _own_comments(base)
            collected |= {name: text for name, text in own.items() if text or name not in collected}
    return collected


def _own_comments(part: type[Options]) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(part))
        (body,) = ast.parse(source).body
    except (OSError, SyntaxError, ValueError):  # a class that was made, not written
        return {}
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    notes = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    alone = {
        t.start[0] for t in tokens if t.type == tokenize.COMMENT and t.line.lstrip()[:1] == "#"
    }
    fields = [node for node in getattr(body, "body", ()) if isinstance(node, ast.AnnAssign)]
    named = {str(getattr(node.target, "id", "")): node for node in fields}
    behind = {n: notes.get(f.end_lineno or 0) or notes.get(f.lineno, "") for n, f in named.items()}
    above = {n: _lines_above(f.lineno, notes, alone) for n, f in named.items()}
    return {name: behind[name] or above[name] for name in named}


def _lines_above(line: int, notes: Mapping[int, str], alone: set[int]) -> str:
    """The comment that stands above a line, joined if it has several lines."""
    first = line
    while first - 1 in alone:
        first -= 1
    return " ".join(notes[number] for number in range(first, line))
