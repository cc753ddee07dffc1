"""Batches that mix generated images with real ones, and the file that the former come from."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from jemkit.config.extra import Extra
from jemkit.data import Dataset, Images, Loader, Shape, Task, steps_per_epoch
from jemkit.errors import ConfigError, DataError
from jemkit.runtime.files import file_hash
from jemkit.runtime.mapped import array_names, map_arrays
from jemkit.training import pseudo_labels

ENTRY = "extra_data"
"""The key of config.json."""
LOOKED_AT = 1000
"""Images whose pixels are looked at before the first step; the file is not read whole."""


class GeneratedImages:
    """A file of generated images, read as they are drawn."""

    def __init__(
        self,
        path: Path,
        x: NDArray[np.uint8],  # [N, C, H, W], or [N, H, W, C]
        y: NDArray[Any],  # [N], classes
        *,
        fraction: float,
        channels_last: bool,
        labelled: dict[str, str] | None = None,
    ) -> None:
        self.path, self.x, self.y = path, x, y
        self.fraction, self.channels_last, self.labelled = fraction, channels_last, labelled

    def take(self, index: Tensor) -> Images:
        """The images of these indices, uint8 on the CPU."""
        y = torch.from_numpy(self.y[index.numpy()].astype(np.int64))
        return Images(self.pixels(index), y)

    def pixels(self, index: Tensor) -> Tensor:
        """[n, C, H, W], uint8 on the CPU."""
        x = torch.from_numpy(self.x[index.numpy()])
        return x.permute(0, 3, 1, 2) if self.channels_last else x

    def record(self) -> dict[str, Any]:
        """What config.json says of them; reads the whole file for its hash."""
        about: dict[str, Any] = {
            "file": str(self.path), "sha256": file_hash(self.path), "images": len(self.x),
            "fraction": self.fraction,
        }  # fmt: skip
        return about if self.labelled is None else {**about, "labels": self.labelled}


class MixedLoader(Loader):
    """Batches of B of which int(fraction B) images are generated, at random places.

    Generated images are drawn with replacement. The real ones are the next of a random order, which
    is drawn for each epoch of ceil(N / B) batches of N real images: an epoch sees a part of them.
    Where it needs more than N, the order starts again.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        rng: Generator,
        generated: GeneratedImages,
        draws: Generator,
        **form: Any,
    ) -> None:
        super().__init__(images, batch_size, rng, **form)
        self.generated, self.draws = generated, draws
        self.n_generated = math.floor(generated.fraction * self.batch_size + 1e-9)
        if not self.n_generated:
            raise ConfigError(
                f"extra.fraction = {generated.fraction:g} of a batch of {self.batch_size} is less "
                "than one image: raise the fraction or run.batch_size"
            )
        self.steps_per_epoch = steps_per_epoch(len(images.y), batch_size, mixed=True)

    def _next(self) -> tuple[Images, Tensor, Tensor | None]:
        at, n = self._place(), len(self.images.y)
        n_real, device = self.batch_size - self.n_generated, self.images.x.device
        drawn = torch.randint(len(self.generated.x), (self.n_generated,), generator=self.draws)
        own = torch.randperm(self.batch_size, generator=self.draws)[self._rows]
        is_generated = own >= n_real
        first = ((at * n_real + own[~is_generated]) % n).to(device)
        second = drawn[own[is_generated] - n_real]
        real, new = self.images.take(self.order[first]), self.generated.take(second)
        pixels = new.x if real.x.dtype == torch.uint8 else new.x.float() / 255
        whole = Images(
            torch.cat([real.x, pixels.to(device)]), torch.cat([real.y, new.y.to(device)])
        )
        index = torch.cat([self.order[first], n + second.to(device)])
        back = torch.cat([(~is_generated).nonzero(), is_generated.nonzero()]).flatten().argsort()
        back = back.to(device)
        return whole.take(back), index[back], is_generated.to(device)

    def state_dict(self) -> dict[str, Tensor | int]:
        return {**super().state_dict(), "generated": self.draws.get_state()}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        super().load_state_dict(state)
        self.draws.set_state(torch.as_tensor(state["generated"]))


def record(loader: Loader) -> dict[str, Any]:
    """The entry of config.json for generated images; empty if there are none."""
    return {ENTRY: loader.generated.record()} if isinstance(loader, MixedLoader) else {}


def check_same(loader: Loader, config: Mapping[str, Any]) -> None:
    """While resuming, reject generated images other than those that the run started with."""
    known, now = config.get(ENTRY), record(loader).get(ENTRY)
    if not isinstance(known, dict | None):
        raise DataError(f"config.json: {ENTRY} is damaged")
    if identity(known) != identity(now):
        named = "none" if now is None else now["file"]
        began = "none" if known is None else f"{known.get('images')} images of {known.get('file')}"
        raise DataError(
            f"the generated images, {named}, or the model that labels them are not those that the "
            f"run was started with, {began}. Restore them, or start a new run"
        )


def identity(entry: Mapping[str, Any] | None) -> Any:
    """What has to stay the same; files may move."""
    labels = (entry or {}).get("labels")
    own = {name: (entry or {}).get(name) for name in ("sha256", "images", "fraction")}
    return own, labels.get("weights") if isinstance(labels, dict) else labels


def open_generated(
    extra: Extra, dataset: Dataset, task: Task, device: torch.device
) -> GeneratedImages:
    """The file of a recipe, checked; labelled by its model if there are no labels in it."""
    path, fraction = extra.file, extra.fraction
    if path is None or fraction is None:
        raise ConfigError("extra.file and extra.fraction: expected both")
    arrays = map_arrays(path, ("image", "label"))
    if "image" not in arrays:
        raise DataError(
            f"{path} has no array image, but {', '.join(array_names(path)) or 'none'}; expected "
            "image [N, H, W, C], uint8, and label [N]"
        )
    channels_last = _check_images(path, arrays["image"], task.shape)
    images = GeneratedImages(
        path, arrays["image"], np.empty(0), fraction=fraction, channels_last=channels_last
    )
    if "label" in arrays:
        if extra.labels is not None:
            raise ConfigError(f"{path} has labels: omit --extra-labels (extra.labels)")
        images.y = _checked_labels(path, arrays["label"], len(images.x), task.n_classes)
    elif extra.labels is None:
        raise DataError(
            f"{path} has no labels, an array label [N]: add them, or give --extra-labels "
            "(extra.labels) a run, a checkpoint or an exported model to predict them"
        )
    else:
        images.y, images.labelled = pseudo_labels.predicted(
            extra.labels, path, images.pixels, len(images.x), dataset, task, device
        )
    return images


def _check_images(path: Path, x: NDArray[Any], shape: Shape) -> bool:
    """Whether the channels come last; a DataError if these cannot join the training images."""
    channels, height, width = shape
    last = x.shape[1:] == (height, width, channels)
    if not last and x.shape[1:] != shape:
        raise DataError(
            f"{path}: image is {list(x.shape)}; expected [N, {height}, {width}, {channels}] or "
            f"[N, {channels}, {height}, {width}], as the training images are. Resize them first"
        )
    if not len(x):
        raise DataError(f"{path} has no images")
    some = x[:: math.ceil(len(x) / LOOKED_AT)]
    if x.dtype != np.uint8:
        raise DataError(
            f"{path}: image is {x.dtype}, with values from {some.min():.3g} to {some.max():.3g}; "
            "expected uint8 in 0..255: for floats in [0, 1] store "
            "(image * 255).round().astype('uint8')"
        )
    if some.max() <= 1:
        raise DataError(
            f"{path}: pixels run from {some.min()} to {some.max()}, which is black in 0..255; "
            "multiply them by 255 if 1 is white"
        )
    return last


def _checked_labels(path: Path, y: NDArray[Any], n_images: int, n_classes: int) -> NDArray[Any]:
    """Labels [N] in 0..n_classes - 1; they stay in the file."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (n_images,) or y.dtype.kind not in "iu":
        raise DataError(
            f"{path}: label is {list(y.shape)} of {y.dtype}; expected {n_images} whole numbers, "
            "one per image"
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= n_classes:
        raise DataError(
            f"{path}: labels run from {low} to {high}; the data set has the classes 0 to "
            f"{n_classes - 1}"
        )
    return y
