"""Pseudo-labels: the classes that a trained model predicts for generated images."""

import hashlib
import io
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jemkit.backbone import Backbone
from jemkit.config.recipe import resolve
from jemkit.config.registry import installed
from jemkit.data import Dataset, Task
from jemkit.errors import DataError
from jemkit.runtime.files import cache_folder, write_bytes
from jemkit.runtime.mapped import map_arrays
from jemkit.runtime.modes import eval_mode
from jemkit.runtime.rng import generator
from jemkit.runtime.work_cache import tensors_hash
from jemkit.training.opened import Opened, open_model
from jemkit.training.pinned import CONFIG, read

log = logging.getLogger("jemkit.data")

BATCH = 500
CLASSES = "Give a model of the data set's classes, in their order"


def predicted(
    model: Path, file: Path, pixels: Callable[[Tensor], Tensor], n: int, dataset: Dataset,
    task: Task, device: torch.device,
) -> tuple[NDArray[np.int64], dict[str, str]]:  # fmt: skip
    """The classes of the n images of a file, [N], and what config.json says of the model.

    They are cached, for restarts and other processes.
    """
    opened = open_model(model)
    about = {"model": str(model), "weights": tensors_hash(opened.weights)}
    status = file.stat()
    key = f"{file} {status.st_size} {status.st_mtime_ns} {about['weights']} {device.type}"
    cached = cache_folder() / "labels" / f"{hashlib.sha256(key.encode()).hexdigest()}.npy"
    backbone = _built(opened, dataset, task, device)
    if not cached.exists():
        log.info("predicting the classes of %d generated images by %s", n, model)
        cached.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.save(content, _labels(backbone, pixels, n, device))
        write_bytes(cached, content.getvalue())
    return np.asarray(map_arrays(cached, ["label"])["label"], np.int64), about


def _labels(
    backbone: Backbone, pixels: Callable[[Tensor], Tensor], n: int, device: torch.device
) -> NDArray[np.int64]:
    labels = np.empty(n, np.int64)
    with eval_mode(backbone.model), torch.no_grad():
        for rows in torch.split(torch.arange(n), BATCH):
            x = backbone.bounds.from_unit(pixels(rows).to(device).float() / 255)
            labels[rows.numpy()] = backbone.model(x).logits.argmax(1).cpu().numpy()
    return labels


def _built(opened: Opened, dataset: Dataset, task: Task, device: torch.device) -> Backbone:
    """The model's backbone, for images of this task."""
    config = opened.folder / CONFIG
    pin = read(config, CLASSES)
    if pin is not None:
        pin.check_classes(dataset)
    recipe = resolve(installed(), config=config).recipe
    backbone = recipe.backbone.build(replace(task, fill=False), generator(device, 0, "labels"))
    try:
        backbone.model.load_state_dict(opened.weights)
    except RuntimeError:
        raise DataError(
            f"{opened.folder} is a model of other images or classes than the training images: "
            "give one that was trained on this data set to --extra-labels"
        ) from None
    return backbone
