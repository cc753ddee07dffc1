"""What a class or function refers to: its package, the global names that it reads, its methods."""

import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

BY_NAME = frozenset({"torch", "numpy", "jemkit", "jemkit_plugins", "jemkit_cli", "builtins"})
"""Packages whose code is known by its name; their versions stand in every protocol."""

ENTRIES = ("forward", "__call__", "scores", "read", "stem", "trunk")
"""Methods from which the code that a judged model runs is followed."""


def home(value: Any) -> str:
    """The module in which a class or function was written."""
    if isinstance(value, types.FunctionType):
        return str(value.__globals__.get("__name__", value.__module__))
    return str(value.__module__)


@functools.cache
def package(module: str) -> str | None:
    """The version of an installed package, "" of one that a protocol names; None of one's own."""
    top = module.split(".")[0]
    if top == "__main__":  # of a notebook or of `python -m` it has an installed package's file
        return None
    loaded = sys.modules.get(top)
    file = PurePath(getattr(loaded, "__file__", None) or "")
    installed = bool({"site-packages", "dist-packages"} & set(file.parts))
    shipped = not file.name or file.is_relative_to(sysconfig.get_path("stdlib"))
    if top in BY_NAME or (top in sys.stdlib_module_names and shipped and not installed):
        return ""
    if installed:
        return str(getattr(loaded, "__version__", ""))
    return None


def content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def globals_of(code: types.CodeType) -> list[str]:
    """The global names that a function reads."""
    names = {
        str(step.argval)
        for part in _nested(code)
        for step in dis.get_instructions(part)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return sorted(names)


def names_in(code: types.CodeType) -> Iterator[str]:
    """Names of attributes, and texts that may be names of some."""
    for part in _nested(code):
        yield from part.co_names
        yield from (c for c in part.co_consts if isinstance(c, str))


def followed_methods(kind: type) -> set[str]:
    """The methods that judging a model may run, by the names that each of them holds."""
    entries = {name: entry for base in reversed(kind.__mro__) for name, entry in vars(base).items()}
    names: set[str] = set()
    queue = [name for name in ENTRIES if name in entries]
    while queue:
        name = queue.pop()
        if name in names:
            continue
        names.add(name)
        entry = entries[name]
        if isinstance(entry, property):
            entry = entry.fget
        inner = entry.__func__ if isinstance(entry, staticmethod | classmethod) else entry
        if isinstance(inner, types.FunctionType):
            queue += [name for name in names_in(inner.__code__) if name in entries]
    return names
