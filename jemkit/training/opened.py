"""The weights of a run, one of its checkpoints or an exported model, found and checked."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from jemkit.errors import ConfigError, DataError
from jemkit.runtime import checkpoint
from jemkit.runtime.files import load_tensors
from jemkit.runtime.run_dir import RunFolder
from jemkit.training.model_card import WEIGHTS
from jemkit.training.model_folder import is_exported, verify
from jemkit.training.pinned import CONFIG
from jemkit.training.resuming import check_config
from jemkit.training.saved_state import weights_of

Which = Literal["best", "last"]


class Opened(NamedTuple):
    """The weights of a run, of one of its checkpoints or of an exported model, all checked."""

    folder: Path  # the run's or the exported model's, which has the config.json
    weights: dict[str, torch.Tensor]  # averaged ones where the run keeps an average
    about: dict[str, Any]  # what a record says of them
    state: checkpoint.State | None = None  # all that the checkpoint holds


def open_model(path: Path, which: Which = "best") -> Opened:
    """Open a run at one of its checkpoints, a checkpoint, or an exported or imported model.

    Raises DataError if it is damaged or missing, ConfigError for the last checkpoint of what has
    none.
    """
    if which == "last" and (is_exported(path) or (path / checkpoint.MANIFEST).exists()):
        raise ConfigError(f"only a run has a last checkpoint; {path} holds one set of weights")
    if is_exported(path):
        sha = verify(path)
        return Opened(path, load_tensors(path / WEIGHTS), {"run": path.name, "sha256": sha})
    if (path / checkpoint.MANIFEST).exists():
        run = path.resolve().parents[1]
        if not (run / CONFIG).exists():
            raise DataError(
                f"{path} is a checkpoint outside its run: there is no {run / CONFIG} to say what "
                "it is. Give the run, or its model.safetensors with --network"
            )
    else:
        run = run_folder(path).path
        steps = run / "checkpoints"
        chosen = steps / "best" if which == "best" else checkpoint.newest(steps)
        if chosen is None or not chosen.exists():
            hint = "; no epoch is complete yet; --checkpoint last uses the newest step"
            hint = hint if which == "best" and checkpoint.newest(steps) else ""
            raise DataError(f"{run} has no complete {which} checkpoint{hint}")
        path = chosen
    opened = read_checkpoint(run, path)
    check_config(run / CONFIG, opened.state or {}, path)
    return opened


def read_checkpoint(run: Path, path: Path) -> Opened:
    """One of a run's checkpoints."""
    state = checkpoint.load(path)
    weights, averaged = weights_of(state, path)
    about = {
        "run": run.name,
        "checkpoint": path.name,
        "sha256": checkpoint.verify(path)[checkpoint.MODEL],
        "weights": "averaged" if averaged else "live",
    }
    return Opened(run, dict(weights), about, state)


def run_folder(path: Path) -> RunFolder:
    """The folder of a run that exists; `latest` is followed to the run that it points to."""
    if not (path / CONFIG).exists():
        raise DataError(
            f"{path} is not a run of jemkit and not an exported model: it has no {CONFIG}; "
            "`jemkit train` and `jemkit export` make them"
        )
    return RunFolder(path.resolve())
