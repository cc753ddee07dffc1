"""What samples are drawn from: a run as one of its checkpoints has it, or an exported model."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from jemkit import checkpoint
from jemkit.backbone import Backbone, Task
from jemkit.density import Density
from jemkit.errors import MisfitError
from jemkit.exported import CONFIG, WEIGHTS, is_exported, verify
from jemkit.objective import Conditional
from jemkit.pinned import SAMPLED
from jemkit.recipe import Run
from jemkit.registry import Registry
from jemkit.restoring import Restored, Which, chosen, restored, run_folder, saved_state
from jemkit.runtime.files import load_tensors
from jemkit.runtime.folder import versions
from jemkit.saved import weights_of


class Source(NamedTuple):
    """A model that has a density."""

    task: Task
    table: dict[str, Any]  # [backbone] of the run's recipe
    backbone: Backbone
    density: Density
    state: dict[str, Any] | None  # all that the checkpoint holds; None of an exported model
    card: dict[str, Any]  # what tells where the model came from
    run: Run  # whose precision and switches chains are drawn in
    conditional: bool  # whether its chains were drawn of given classes
    classes: tuple[str, ...] = ()  # their names in the order of the labels, where they are known


def opened(
    path: Path,
    registry: Registry,
    device: torch.device,
    which: Which,
    dataset: dict[str, Any] | None = None,
) -> Source:
    """What stands at `path`, with averaged weights where an average was kept.

    `dataset` says where the training images are now, where the start needs them.
    """
    if is_exported(path):
        sha = verify(path)
        weights = load_tensors(path / WEIGHTS)
        found = restored(
            path / CONFIG, weights, registry, device, dataset, advice=SAMPLED, same_data=True
        )
        return _source(found, None, {"run": str(path.resolve()), "sha256": sha})
    folder = run_folder(path)
    saved = chosen(folder, which)
    state = saved_state(folder.path, saved)
    weights, averaged = weights_of(state, saved)
    found = restored(
        folder.path / CONFIG, weights, registry, device, dataset, advice=SAMPLED, same_data=True
    )
    about = {
        "run": str(folder.path),
        "weights": "averaged" if averaged else "live",
        "checkpoint": saved.name,
        "sha256": checkpoint.verify(saved)[checkpoint.MODEL],
    }
    return _source(found, state, about)


def _source(found: Restored, state: dict[str, Any] | None, about: dict[str, Any]) -> Source:
    table, backbone = found.tables["backbone"], found.backbone
    if not backbone.has_density:
        raise MisfitError(
            f"the model's backbone is {table['use']!r}, a classifier without a density: there is "
            "nothing to sample from. Train jem, jempp, mebm or sadajem"
        )
    density = backbone.density
    sampler = table.get("sampler", type(density.sampler).__name__)
    run, objective = found.recipe.run, found.recipe.objective
    conditional = isinstance(objective, Conditional) and objective.conditional
    switches = {name: getattr(run, name) for name in ("precision", "deterministic", "threads")}
    card = {**about, "sampler": sampler, **switches, "versions": versions()}
    names = found.pin.table.classes if found.pin is not None else None
    return Source(
        found.task, table, backbone, density, state, card, run, conditional, names or ()
    )  # fmt: skip
