"""The papers' settings and the presets, as TOML layers."""

from collections.abc import Mapping
from pathlib import Path

from jemkit.hookspecs import hookimpl

FOLDER = Path(__file__).parent
FOR_BOTH = (
    "agr-trades", "at-awp", "ducat", "jeat", "lbgat", "mart", "pgdat", "trades",
    "trades-awp", "weat",
)  # fmt: skip
"""Presets for CIFAR-10 whose NAME-cifar100 is the same file: their papers change no constant."""


@hookimpl
def jemkit_recipes() -> Mapping[str, Path]:
    """All TOML files of this folder by path: data/digits.toml is the layer data/digits."""
    files = {
        path.relative_to(FOLDER).with_suffix("").as_posix(): path
        for path in sorted(FOLDER.rglob("*.toml"))
    }
    return files | {f"preset/{name}-cifar100": files[f"preset/{name}"] for name in FOR_BOTH}
