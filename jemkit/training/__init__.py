"""Building a run, the trainer, validation, health, rollback, checkpoints of runs.

May import: config, and what config may import.
A new file: what a run does until its end.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jemkit.training.trainer import Summary, Trainer, Watch

__all__ = ["Summary", "Trainer", "Watch"]


def __getattr__(name: str) -> object:
    """Names of `__all__`, whose module imports most of the others."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jemkit.training import trainer

    return getattr(trainer, name)
