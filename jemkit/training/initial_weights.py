"""The initial weights of a run (--init-from), and the warnings about them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from jemkit.config.recipe import Recipe
from jemkit.data import Dataset
from jemkit.errors import UsageError
from jemkit.runtime import checkpoint
from jemkit.runtime.files import load_tensors, read_json
from jemkit.training import pinned
from jemkit.training.model_card import WEIGHTS
from jemkit.training.model_folder import is_exported, verify

STEEP = 0.1
"""Share of the learning rate in the first step above which a warning is given: momentum averages
about ten steps, so pretrained weights then move as far as in a run without them."""


class Initial(NamedTuple):
    """Weights, and the config.json of their training, if there is one."""

    path: Path
    weights: dict[str, Tensor]
    config: Mapping[str, Any]


def initial(path: Path) -> Initial:
    """The weights of a run, a checkpoint, an exported or imported model or a safetensors file."""
    if is_exported(path):
        verify(path)
        weights = load_tensors(path / WEIGHTS)
    else:
        weights = checkpoint.load_weights(path)
    at = path.resolve()
    folder = at.parents[1] if (at / checkpoint.MANIFEST).exists() else at
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return Initial(path, weights, config if isinstance(config, dict) else {})


def doubts(start: Initial, recipe: Recipe, total_steps: int) -> list[str]:
    """What may harm these weights, or their meaning, in a run of this recipe."""
    warnings = [_other_classes(start, recipe.data)]
    rate, factor = recipe.optimizer.lr, recipe.schedule.factor(0, total_steps)
    if factor >= STEEP:
        warnings.append(
            f"the first step already uses {factor:.0%} of optimizer.lr = {rate:g}, which may "
            f"destroy the weights of {start.path}: use a lower optimizer.lr, or a longer warm-up "
            "by schedule.warmup (steps) and schedule.warmup_share (of the run)"
        )
    return [text for text in warnings if text]


def check_same(start: Path, config: Mapping[str, Any]) -> None:
    """While resuming, reject initial weights other than those that the run started with."""
    about = config.get("init_from")
    known = about if isinstance(about, dict) else {}
    if str(start) != known.get("given") and str(start.resolve()) != known.get("path"):
        began = known.get("given", "randomly initialised weights")
        raise UsageError(
            f"--init-from {start}: the run was started with {began}. Omit it with --resume, or "
            "start a new run"
        )


def _other_classes(start: Initial, dataset: Dataset) -> str:
    try:
        table = pinned.Table.model_validate(start.config.get("data"))
    except ValueError:  # nothing is known of them
        return ""
    known, came = table.classes, pinned.class_names(dataset)
    if known is None or came is None or known == came:
        return ""
    return (
        f"the weights of {start.path} were trained on {pinned.names(known, came)}; this run's "
        f"classes are {pinned.names(came, known)}: its head starts with weights for the former"
    )
