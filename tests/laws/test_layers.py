"""The layers inside of jemkit: who imports whom, and how much stands at the top."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from toys import root

HOME = root() / "jemkit"
LAYERS = (
    "errors options", "runtime", "data splits selection", "models", "sampling", "attacks",
    "backbone", "objective", "updaters", "step", "metrics", "hookspecs", "config", "training",
    "evaluation", "testing", "builtin public", "__init__ __main__",
)  # fmt: skip
"""A module imports from its own folder and from layers before it, also for type checkers alone."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}


def name_of(path: Path) -> str:
    parts = path.relative_to(HOME).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {name_of(path): path for path in sorted(HOME.rglob("*.py"))}


def named(node: ast.AST) -> Iterator[str]:
    """What an import may mean: a module, or a name of it, which may be a module too."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(path: Path) -> set[str]:
    """The modules of jemkit that a file imports, wherever in it."""
    collected = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in named(node):
            top, _, rest = name.partition(".")
            while top == "jemkit" and rest and rest not in FILES:
                rest = rest.rpartition(".")[0]
            if top == "jemkit" and rest:
                collected.add(rest)
    return collected - {name_of(path)}


@cache
def all_imports() -> dict[str, set[str]]:
    return {name: imported(path) for name, path in FILES.items()}


def reached(start: str) -> set[str]:
    """All that a module imports, and what that imports."""
    collected: set[str] = set()
    queue = [start]
    while queue:
        for name in all_imports()[queue.pop()] - collected:
            collected.add(name)
            queue.append(name)
    return collected


def test_every_module_stands_in_a_layer() -> None:
    assert {name.split(".")[0] for name in FILES} <= set(RANK)


def test_a_module_imports_from_its_own_folder_and_from_layers_before_it() -> None:
    upwards = [
        (name, other)
        for name in FILES
        for other in sorted(all_imports()[name])
        if RANK[other.split(".")[0]] > RANK[name.split(".")[0]]
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    reach = {name: reached(name) for name in FILES}
    circles = {
        tuple(sorted({name, *(o for o in reach[name] if name in reach[o])}))
        for name in FILES
        if name in reach[name]
    }
    assert circles == set()


def test_at_most_fourteen_modules_and_nine_folders_stand_at_the_top() -> None:
    folders = {path.parent for path in HOME.glob("*/*.py")}
    assert len(list(HOME.glob("*.py"))) <= 14
    assert len(folders) <= 9


def test_every_folder_says_what_lives_there() -> None:
    for path in sorted(HOME.glob("*/__init__.py")):
        assert len((ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()) >= 3, path
