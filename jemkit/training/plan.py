"""A dry run: the recipe is built and checked, and nothing is written."""

import logging
import math
from pathlib import Path
from typing import Any

from jemkit.config.recipe import Recipe, Resolved
from jemkit.data import Loader
from jemkit.runtime import disk
from jemkit.runtime.files import cache_folder
from jemkit.runtime.precision import slow_precision
from jemkit.runtime.run_dir import RunFolder
from jemkit.sampling.density import Buffered
from jemkit.sampling.init_dists import MomentStart, start_name
from jemkit.training.build import RunState, build_run, load_model
from jemkit.training.initial_weights import doubts, initial
from jemkit.training.mixing import MixedLoader
from jemkit.training.run import checkpoint_count
from jemkit.training.tracking import Tracking

log = logging.getLogger(__name__)


def plan(resolved: Resolved, out: Path, *, init_from: Path | None = None) -> dict[str, Any]:
    """Make every check that `train` makes before its first step; returns a description by name."""
    RunFolder.check_vacant(out)
    Tracking(resolved.recipe.trackers, RunFolder(out))
    parts = build_run(resolved.recipe, fill=False)
    model = parts.backbone.model
    if init_from is not None:
        start = initial(init_from)
        load_model(model, start.weights)
        for doubt in doubts(start, resolved.recipe, parts.task.total_steps):
            log.warning("%s", doubt)
    if slow := slow_precision(resolved.recipe.run.precision, parts.device):
        log.warning("%s", slow)
    names = {table: part["use"] for table, part in resolved.tables.items() if "use" in part}
    network = resolved.tables["backbone"].get("network", {})
    return {
        "run": str(out),
        "dataset": names["data"],
        "image shape": list(parts.task.shape),
        "training images": parts.task.n_train,
        **_generated(parts.loader),
        **{kind: names[kind] for kind in ("backbone", "objective", "updater", "optimizer")},
        "network": network.get("use", type(model.network).__name__),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(parts.device),
        "precision": resolved.recipe.run.precision,
        "epochs": resolved.recipe.run.epochs,
        "steps": parts.task.total_steps,
        "steps per epoch": parts.loader.steps_per_epoch,
        **_disk(parts, resolved.recipe),
    }


def _generated(loader: Loader) -> dict[str, str]:
    """Generated images and their part of a batch."""
    if not isinstance(loader, MixedLoader):
        return {}
    part = f"{loader.n_generated} of {loader.batch_size} in every batch"
    return {"generated images": f"{len(loader.generated.x)}, {part}"}


def _disk(parts: RunState, recipe: Recipe) -> dict[str, str]:
    """The disk space that the run will use, and that of its initial distribution."""
    one = disk.state_bytes(parts.weights()) + disk.momenta_bytes(parts.optimizer)
    rows: dict[str, str] = {}
    buffer, density = "", parts.backbone.density_or_none
    if density is not None:
        rows["start"] = start_name(density.start)
        if isinstance(density, Buffered):
            states = 4 * density.buffer.options.capacity * math.prod(parts.task.shape)
            buffer = f", {disk.readable(states)} of it the replay buffer"
            one += states
        if isinstance(density.start, MomentStart):
            density.start.check()
            size = disk.readable(density.start.form.bytes)
            rows["disk of the start"] = f"{size} at most, in {cache_folder() / 'moments'}"
    keep = checkpoint_count(recipe, parts.loader.steps_per_epoch)
    steps, epochs = parts.task.total_steps, recipe.run.epochs
    whole = disk.readable(disk.run_bytes(one, keep=keep, steps=steps, epochs=epochs))
    parts_of_it = f"{keep + 2} checkpoints of {disk.readable(one)}{buffer}; pictures and logs"
    return {**rows, "disk of the run": f"{whole} at most: {parts_of_it}"}
