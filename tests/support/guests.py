"""Plug-ins of others, as an installer leaves them in a folder on the path."""

import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path


def place(site: Path, name: str, code: str, groups: Mapping[str, Mapping[str, str]]) -> None:
    """A distribution with one module, and its entry points by group."""
    about = site / f"{name}-0.7.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.7\n")
    lines = [f"[{group}]\n{_lines(entries)}" for group, entries in groups.items()]
    (about / "entry_points.txt").write_text("\n".join(lines))
    (site / f"{groups['jemkit'][name]}.py").write_text(code)


def _lines(entries: Mapping[str, str]) -> str:
    return "".join(f"{name} = {value}\n" for name, value in entries.items())


def install(source: Path, site: Path) -> None:
    """A package of `jemkit plugins new`, without an installer."""
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    (name,) = project["entry-points"]["jemkit"]
    module = source / f"jemkit_{name}.py"
    place(site, name, module.read_text(), project["entry-points"])
    shutil.copytree(source / "tests", site / f"tests_of_{name}")
