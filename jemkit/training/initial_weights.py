"""Weights that a new run begins with, and what is to be said of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from jemkit.config.layers import flat
from jemkit.config.recipe import Recipe
from jemkit.data import Dataset
from jemkit.errors import UsageError
from jemkit.runtime import checkpoint
from jemkit.runtime.files import read_json
from jemkit.training import pinned

STEEP = 0.1
"""Of the learning rate in the first step: from there on momentum, which looks back some ten steps,
takes trained weights as far as a run does that begins with none."""


class Initial(NamedTuple):
    """Weights, and the config.json of what they were trained in, where there is one."""

    path: Path
    weights: dict[str, Tensor]
    config: Mapping[str, Any]


def initial(path: Path) -> Initial:
    """The weights of a run, a checkpoint, an exported or imported model or a safetensors file."""
    weights = checkpoint.load_weights(path)
    at = path.resolve()
    folder = at.parents[1] if (at / checkpoint.MANIFEST).exists() else at
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return Initial(path, weights, config if isinstance(config, dict) else {})


def initial_source(path: Path) -> dict[str, str]:
    """What a run keeps of where its weights come from."""
    return {"given": str(path), "path": str(path.resolve())}


def doubts(start: Initial, recipe: Recipe, total_steps: int) -> list[str]:
    """What may spoil these weights, or their meaning, in a run of this recipe."""
    found = [_other_classes(start, recipe.data)]
    rate, factor = recipe.optimizer.lr, recipe.schedule.factor(0, total_steps)
    trained = dict(flat(start.config)).get("recipe.optimizer.lr")
    use = dict(flat(start.config)).get("recipe.optimizer.use")
    if factor >= STEEP:
        found.append(
            f"the first step already takes {factor:.0%} of optimizer.lr = {rate:g}, which may undo "
            f"the weights of {start.path} before anything is learnt: take a lower optimizer.lr, or "
            "a longer warm-up by schedule.warmup (steps) and schedule.warmup_share (of the run)"
        )
    if use == recipe.optimizer.use and isinstance(trained, float) and rate > trained:
        found.append(
            f"optimizer.lr = {rate:g} is more than the {trained:g} that the weights of "
            f"{start.path} were trained with, and may undo them: take a lower one"
        )
    return [text for text in found if text]


def check_same(start: Path, config: Mapping[str, Any]) -> None:
    """Refuse, while resuming, other weights than those that the run began with."""
    about = config.get("init_from")
    known = about if isinstance(about, dict) else {}
    if str(start) != known.get("given") and str(start.resolve()) != known.get("path"):
        began = known.get("given", "weights that it drew itself")
        raise UsageError(
            f"--init-from {start}: the run was started with {began}. Leave it out with --resume, "
            "or begin a new run"
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
        f"classes are {pinned.names(came, known)}: its head begins with what it learnt of them"
    )
