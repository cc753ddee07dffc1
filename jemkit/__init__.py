"""jemkit: train, sample from, attack and evaluate joint energy-based models.

The public names are those of `jemkit.public`. They are imported when first used, so that `python -m
jemkit` handles ^C before torch is imported.
"""

TYPE_CHECKING = False  # as type checkers read it; importing `typing` takes a while
if TYPE_CHECKING:
    from jemkit.public import *  # noqa: F403
    from jemkit.public import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        """A module of the package, or a public name."""
        from importlib import import_module
        from importlib.util import find_spec

        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module 'jemkit' has no attribute {name!r}")
        if find_spec(f"jemkit.{name}") is not None:  # modules import each other before that
            return import_module(f"jemkit.{name}")
        public = import_module("jemkit.public")
        if not hasattr(public, name):
            raise AttributeError(f"module 'jemkit' has no attribute {name!r}")
        globals()[name] = getattr(public, name)
        return globals()[name]

    def __dir__() -> list[str]:
        from jemkit import public

        return sorted({*globals(), *public.__all__})
