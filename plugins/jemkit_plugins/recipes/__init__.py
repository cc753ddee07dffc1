"""The papers' settings and the presets, as TOML layers."""

from collections.abc import Mapping
from pathlib import Path

from jemkit.hookspecs import hookimpl

FOLDER = Path(__file__).parent


@hookimpl
def jemkit_recipes() -> Mapping[str, Path]:
    """All TOML files of this folder by path: data/digits.toml is the layer data/digits."""
    return {
        path.relative_to(FOLDER).with_suffix("").as_posix(): path
        for path in sorted(FOLDER.rglob("*.toml"))
    }
