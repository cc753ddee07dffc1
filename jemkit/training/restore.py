"""A run's parts in the state of one of its checkpoints."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from jemkit.backbone import Backbone
from jemkit.config.recipe import Recipe, resolve
from jemkit.config.registry import Registry
from jemkit.data import Images, Shape, Task, images_hash
from jemkit.errors import ConfigError, DataError, JemkitError
from jemkit.models.networks import check_features
from jemkit.runtime.checkpoint import State
from jemkit.runtime.files import read_json
from jemkit.runtime.rng import generator
from jemkit.sampling.moments import brought
from jemkit.splits import Splits
from jemkit.training.build import described_task, laid_out, load_model, splits_of, task_of
from jemkit.training.compatibility import trained_threat
from jemkit.training.model_folder import saved_task
from jemkit.training.opened import Opened
from jemkit.training.pinned import CONFIG, JUDGED, Pin, read


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
    without_images: bool = False,
) -> Restored:
    """The backbone of what was opened, with its weights, and its own data as they were.

    Another `dataset` must have the run's classes; with `same_data`, its images too. With
    `without_images` no image is read if the shape of the images is known otherwise.
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
    if saved is None and without_images and is_own(dataset):
        saved = pinned_task(recipe, splits, pin, opened.state)
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


def pinned_task(
    recipe: Recipe, splits: Splits, pin: Pin | None, state: State | None = None
) -> Task | None:
    """The task of a run by its config.json, without its images; None if it does not say enough.

    Runs of earlier versions have no shape: it is then the data set's, if it has a fixed one, or
    that of the states in the checkpoint's replay buffer.
    """
    train = None if pin is None else pin.table.train
    if pin is None or train is None:
        return None
    states = ((state or {}).get("density") or {}).get("states")
    buffer: Any = states.shape[1:] if isinstance(states, Tensor) and states.dim() == 4 else None
    known = pin.table.shape or getattr(recipe.data, "shape", None) or buffer
    shape: Shape | None = None if known is None else tuple(known)
    if shape is None:
        return None
    return described_task(recipe, splits, shape, pin.table.n_classes, train.images, train.sha256)


def _own_start(task: Task, config: Path, registry: Registry, pin: Pin | None) -> Task:
    """The task of other data; chains start from the run's own training images.

    They are read at the first draw of a distribution that needs them and has no cached moments.
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
        shape = " x ".join(map(str, task.shape))
        raise DataError(
            f"{config}: [task] names images of {shape}, which the model does not accept; export or "
            "import it again"
        ) from None


def is_own(dataset: dict[str, Any] | None) -> bool:
    """Whether the data set is the run's own, possibly in another folder."""
    return not dataset or "use" not in dataset


def about_parts(tables: dict[str, Any], recipe: Recipe, radius_px: float | None) -> dict[str, Any]:
    """The entry of a record for the recipe of the weights, trained on data of this radius."""
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
