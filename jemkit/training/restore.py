"""A run's parts in the state of one of its checkpoints."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from jemkit.attacks.pixel_model import LoadedModel, PixelModel
from jemkit.backbone import Backbone
from jemkit.config.recipe import Recipe, resolve
from jemkit.config.registry import Registry, installed
from jemkit.data import Images, Task, images_hash
from jemkit.errors import ConfigError, DataError, JemkitError
from jemkit.models.networks import check_features
from jemkit.runtime import checkpoint
from jemkit.runtime.files import load_tensors, read_json
from jemkit.runtime.rng import generator
from jemkit.runtime.run_dir import RunFolder
from jemkit.sampling.moments import brought
from jemkit.splits import Splits
from jemkit.training.build import load_model, splits_of, task_of
from jemkit.training.compatibility import trained_threat
from jemkit.training.memory_format import laid_out
from jemkit.training.model_files import WEIGHTS, is_exported, saved_task, verify
from jemkit.training.pinned import CONFIG, JUDGED, Pin, read
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
    """Open a run at one of its checkpoints, a checkpoint, or an exported or imported model."""
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
        folder = run_folder(path)
        run, path = folder.path, select_checkpoint(folder, which)
    state = saved_state(run, path)
    weights, averaged = weights_of(state, path)
    return Opened(run, dict(weights), about_checkpoint(run, path, averaged=averaged), state)


def saved_state(run: Path, path: Path) -> checkpoint.State:
    """What a run's checkpoint holds, where config.json is the one that it was saved with."""
    state = checkpoint.load(path)
    check_config(run / CONFIG, state, path)
    return state


def about_checkpoint(run: Path, path: Path, *, averaged: bool) -> dict[str, Any]:
    """What a record says of the weights of a checkpoint."""
    return {
        "run": run.name,
        "checkpoint": path.name,
        "sha256": checkpoint.verify(path)[checkpoint.MODEL],
        "weights": "averaged" if averaged else "live",
    }


class Restored(NamedTuple):
    """A recipe's parts with the weights of a checkpoint."""

    recipe: Recipe
    tables: dict[str, Any]
    task: Task
    splits: Splits
    backbone: Backbone
    pin: Pin | None  # of the data that it was trained on
    trained_px: float | None  # the usual radius of those data; None: unknown


def restored(
    opened: Opened,
    registry: Registry,
    device: torch.device,
    dataset: dict[str, Any] | None = None,
    *,
    advice: str = JUDGED,
    same_data: bool = False,
) -> Restored:
    """The backbone of what was opened, with its weights, and its own data as they were.

    Another `dataset` must have the run's classes; with `same_data`, its images too.
    """
    config = opened.folder / CONFIG
    resolved = resolve(registry, config=config, named={"data": dataset} if dataset else {})
    recipe = resolved.recipe
    run, pin = recipe.run, read(config, advice)
    own, other = pin, bool(dataset) and not same_data
    if pin is not None and other:
        pin = pin.named(recipe.data)
    splits = splits_of(recipe, None if other else pin)
    saved = saved_task(read_json(config), recipe, splits) if is_own(dataset) else None
    task = task_of(recipe, splits) if saved is None else saved
    trained_px = task.radius_px if is_own(dataset) else _usual_radius(config, registry)
    if other:
        task = _own_start(task, config, registry, own)
    task = replace(task, fill=False, moments=brought(config))  # opening a model draws nothing
    backbone = recipe.backbone.build(task, generator(device, run.seed, "chains"))
    load_model(backbone.model, opened.weights)
    if saved is not None:
        _check_shape(backbone, saved, config)
    laid_out(backbone.model, run.layout, device)  # as in training, bit for bit
    return Restored(recipe, resolved.tables, task, splits, backbone, pin, trained_px)


def _own_start(task: Task, config: Path, registry: Registry, pin: Pin | None) -> Task:
    """The task of other data; chains start from the run's own training images.

    They are read at the first draw of an initial distribution that needs them, if the cache has no
    moments.
    """

    def images(split: Literal["train", "valid"]) -> Images:
        try:
            recipe = resolve(registry, config=config).recipe
        except ConfigError as error:  # no installed package provides the data set
            raise DataError(str(error)) from None
        return splits_of(recipe, pin).images(split)

    known = None if pin is None else pin.table.train
    if known is not None:
        with suppress(DataError):  # other data may have no training images
            if images_hash(task.images("train")) == known.sha256:
                return task  # the run's own data set, in another folder
    return replace(task, images=images, hash="" if known is None else known.sha256)


def _usual_radius(config: Path, registry: Registry) -> float | None:
    """The radius of the data set in a config.json; None if no installed package provides it."""
    try:
        return resolve(registry, config=config).recipe.data.radius_px
    except JemkitError:
        return None


def _check_shape(backbone: Backbone, task: Task, config: Path) -> None:
    """Reject a [task] whose images the model does not accept, as far as shapes show."""
    try:
        check_features(backbone.model.network, task.shape)
    except (ValueError, RuntimeError) as error:
        if "meta" in str(error).lower():  # the network needs real tensors
            return
        raise DataError(
            f"{config}: [task] names images of {' x '.join(map(str, task.shape))}, which the "
            f"model does not accept; export or import it again"
        ) from None


def is_own(dataset: dict[str, Any] | None) -> bool:
    """Whether the data set is the run's own, possibly in another folder."""
    return not dataset or "use" not in dataset


def about_parts(tables: dict[str, Any], recipe: Recipe, radius_px: float | None) -> dict[str, Any]:
    """The entry of a record for the recipe of the weights; the radius is the default of the data
    that they were trained on."""
    parts = {kind: tables[kind]["use"] for kind in ("backbone", "objective", "data")}
    trained = None if radius_px is None else trained_threat(recipe.objective, radius_px)
    other = {} if trained is None or trained.norm == "Linf" else {"trained_norm": trained.norm}
    return {
        **parts,
        "network": tables["backbone"]["network"],
        "seed": recipe.run.seed,
        "trained_radius_px": None if trained is None else trained.radius_px,
        **other,
    }


def run_folder(path: Path) -> RunFolder:
    """The folder of a run that exists; `latest` is followed to the run that it points to."""
    if not (path / CONFIG).exists():
        raise DataError(
            f"{path} is not a run of jemkit and not an exported model: it has no {CONFIG}; "
            "`jemkit train` and `jemkit export` make them"
        )
    return RunFolder(path.resolve())


def select_checkpoint(folder: RunFolder, which: Which) -> Path:
    """The requested checkpoint of a run."""
    best = folder.checkpoints / "best"
    path = best if which == "best" else checkpoint.newest(folder.checkpoints)
    if path is None or not path.exists():
        hint = (
            "; no epoch is complete yet; --checkpoint last uses the newest step"
            if which == "best"
            else ""
        )
        raise DataError(f"{folder.path} has no complete {which} checkpoint{hint}")
    return path


def load(
    folder: str | Path, *, registry: Registry | None = None, device: str = "cpu"
) -> PixelModel:
    """The model of an exported or imported folder: [0, 1] images to logits, in eval mode.

    It reads no data set. A run of `jemkit train` gives its best checkpoint, with averaged weights
    if it has an EMA; that reads the run's data.
    """
    run = restored(open_model(Path(folder)), registry or installed(), torch.device(device))
    density = run.backbone.density_or_none
    return LoadedModel(run.backbone.model, run.task.bounds, density).eval()
