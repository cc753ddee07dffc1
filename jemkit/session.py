"""A run from its folder: begin or go on, train, judge."""

from collections.abc import Callable
from pathlib import Path

from jemkit import checkpoint
from jemkit.assembly import load_model
from jemkit.errors import DataError
from jemkit.recipe import Resolved, complete
from jemkit.registry import Registry
from jemkit.runtime.folder import RunFolder
from jemkit.training import Summary, Trainer, Watch


def train(
    resolved: Resolved,
    out: Path,
    *,
    registry: Registry,
    resume: bool = False,
    init_from: Path | None = None,
    watch: Watch | None = None,
    stop: Callable[[], bool] | None = None,
    latest: Path | None = None,
) -> Summary:
    """Train a recipe into the folder `out` and judge its best epoch on the test split.

    A link `latest` in the folder of that name, else beside the run, points to it. Raises
    ConfigError or DataError before the first step, Diverged, or Preempted once it is saved.
    """
    if not resume:
        RunFolder.check_vacant(out)
    whole = complete(resolved, registry)
    folder = RunFolder.open(out) if resume else None
    trainer = Trainer(whole, folder or RunFolder(out), watch)  # before anything is written
    if stop is not None:
        trainer.stop = stop
    if folder is not None:
        resume_from(trainer, folder)
    else:
        if init_from is not None:
            load_model(trainer.backbone.model, checkpoint.load_weights(init_from))
        RunFolder.create(out)
        trainer.folder.write_config(whole.tables, whole.origins)
    trainer.folder.link_latest(latest or out.parent)
    trainer.folder.event("resume" if resume else "start", step=trainer.step)
    trainer.run()
    return trainer.finish()


def resume_from(trainer: Trainer, folder: RunFolder) -> None:
    """Put a trainer where the newest checkpoint of its folder stands."""
    newest = checkpoint.newest(folder.checkpoints)
    if newest is None:
        raise DataError(f"{folder.path} holds no complete checkpoint to resume from")
    trainer.load_state_dict(checkpoint.load(newest))
    folder.drop_metrics_from(trainer.step)
