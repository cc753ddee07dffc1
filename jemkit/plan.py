"""What a run would be: its recipe put together and checked, and nothing written."""

import logging
from pathlib import Path
from typing import Any

from jemkit.assembly import load_model, put_together
from jemkit.initial import doubts, initial
from jemkit.recipe import Resolved
from jemkit.runtime.folder import RunFolder

log = logging.getLogger(__name__)


def plan(resolved: Resolved, out: Path, *, init_from: Path | None = None) -> dict[str, Any]:
    """Make every check that `train` makes before its first step; what was put together, by name."""
    RunFolder.check_vacant(out)
    parts = put_together(resolved.recipe)
    model = parts.backbone.model
    if init_from is not None:
        start = initial(init_from)
        load_model(model, start.weights)
        for doubt in doubts(start, resolved.recipe, parts.task.total_steps):
            log.warning("%s", doubt)
    names = {table: part["use"] for table, part in resolved.tables.items() if "use" in part}
    network = resolved.tables["backbone"].get("network", {})
    steps = parts.loader.steps_per_epoch
    return {
        "run": str(out),
        "dataset": names["data"],
        "image shape": list(parts.task.shape),
        "training images": parts.task.n_train,
        "backbone": names["backbone"],
        "objective": names["objective"],
        "updater": names["updater"],
        "optimizer": names["optimizer"],
        "network": network.get("use", type(model.network).__name__),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(parts.device),
        "precision": resolved.recipe.run.precision,
        "epochs": resolved.recipe.run.epochs,
        "steps": parts.task.total_steps,
        "steps per epoch": steps,
    }
