"""Every public name is documented: what it is, shapes of tensors, units of sizes, errors."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

from jemkit import errors, evaluation, public, testing, training

PUBLIC = {
    name: getattr(module, name)
    for module in (evaluation, training, testing, public)
    for name in module.__all__
}
CLASSES = {n: c for n, c in PUBLIC.items() if inspect.isclass(c)}
FUNCTIONS = {n: f for n, f in PUBLIC.items() if inspect.isfunction(f)}
OWN = {n: c for n, c in CLASSES.items() if c.__module__.startswith("jemkit")}
OBVIOUS = {"unused", "state_dict", "load_state_dict", "to", "clamp", "mark", "rollback"}
"""Methods whose name says all, or whose protocol does."""


@cache
def notes(module: str) -> dict[str, str]:
    """The string below each assignment of a module."""
    body = ast.parse(inspect.getsource(__import__(module, fromlist=["_"]))).body
    strings = {}
    for node, below in pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(targets[0], ast.Name):
            text = getattr(getattr(below, "value", None), "value", None)
            strings[targets[0].id] = text if isinstance(text, str) else ""
    return strings


@cache
def modules() -> dict[str, str]:
    """The module that defines each public name."""
    named: dict[str, str] = {}
    for module in (public, testing):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ImportFrom):
                named |= {alias.name: str(node.module) for alias in node.names}
    return {**named, "Watch": "jemkit.training.trainer"}


def methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What a class defines itself and a user may call."""
    for name, thing in vars(cls).items():
        function = getattr(thing, "fget", None) or getattr(thing, "__func__", thing)
        if not inspect.isfunction(function) or function.__name__ != name:
            continue  # a field, whose default may be a function
        if not name.startswith("_") and name not in OBVIOUS:
            yield name, function


def doc_of(cls: type, name: str) -> str:
    """The docstring of a method: its own, or that of the protocol or base class it implements."""
    bases = [base for base in cls.__mro__ if vars(base).get(name)]
    protocols = [c for c in OWN.values() if getattr(c, "_is_protocol", False) and name in vars(c)]
    text = [getattr(vars(c)[name], "__doc__", None) or "" for c in (*bases, *protocols)]
    return text[0] or " ".join(text)


def documented() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Public functions and methods, with all that is written about them."""
    for name, function in FUNCTIONS.items():
        yield name, function, function.__doc__ or ""
    for name, cls in OWN.items():
        for method, function in methods(cls):
            yield f"{name}.{method}", function, f"{doc_of(cls, method)} {cls.__doc__ or ''}"


def test_every_public_name_has_a_docstring() -> None:
    bare = [n for n, c in {**CLASSES, **FUNCTIONS}.items() if not (c.__doc__ or "").strip()]
    aliases = [n for n in PUBLIC if n not in CLASSES and n not in FUNCTIONS]
    bare += [n for n in aliases if not notes(modules()[n]).get(n)]
    assert bare == []


def test_every_public_method_has_a_docstring() -> None:
    assert [f"{name}.{method}" for name, cls in OWN.items() for method, _ in methods(cls)
            if not doc_of(cls, method).strip()] == []  # fmt: skip


def test_shapes_of_tensors_are_documented() -> None:
    def tensors(function: Callable[..., Any]) -> bool:
        hints = [p.annotation for p in inspect.signature(function).parameters.values()]
        return any("Tensor" in str(hint) for hint in hints)

    assert [name for name, function, text in documented()
            if tensors(function) and not re.search(r"\[[\w.\]]", text)] == []  # fmt: skip


def test_units_of_sizes_are_documented() -> None:
    def sizes(function: Callable[..., Any]) -> bool:
        names = inspect.signature(function).parameters
        return any(n in ("radius", "eps", "size") or n.endswith("_px") for n in names)

    units = re.compile(r"1/255|units?\b|px\b")
    assert [name for name, function, text in documented()
            if sizes(function) and not units.search(text)] == []  # fmt: skip


def test_errors_are_documented() -> None:
    known = {n for n, c in vars(errors).items() if inspect.isclass(c)} - {"JemkitError"}
    silent = []
    for name, function, text in documented():
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        raised = {getattr(getattr(node.exc, "func", None), "id", "") for node in ast.walk(tree)
                  if isinstance(node, ast.Raise)}  # fmt: skip
        silent += [f"{name}: {error}" for error in raised & known if error not in text]
    assert silent == []
