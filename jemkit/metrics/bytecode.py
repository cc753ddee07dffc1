"""The references of a class or function: its package, the global names it reads, its methods."""

import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

BY_NAME = frozenset({"torch", "numpy", "jemkit", "jemkit_plugins", "jemkit_cli", "builtins"})
"""Packages whose code is identified by name; every protocol contains their versions."""

ENTRIES = ("forward", "__call__", "scores", "read", "stem", "trunk")
"""Methods from which the code that an evaluated model executes is followed."""


def home(value: Any) -> str:
    """The module that defines a class or function."""
    if isinstance(value, types.FunctionType):
        return str(value.__globals__.get("__name__", value.__module__))
    return str(value.__module__)


@functools.cache
def package(module: str) -> str | None:
    """The version of an installed package; "" if protocols contain it, None for the user's code."""
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
    """A function's code and that of its inner functions."""
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
    """Names of attributes, and strings that may be such names."""
    for part in _nested(code):
        yield from part.co_names
        yield from (c for c in part.co_consts if isinstance(c, str))


def followed_methods(kind: type) -> set[str]:
    """The methods that an evaluation may execute, by the names that each of them reads."""
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
