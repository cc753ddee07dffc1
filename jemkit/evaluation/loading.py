"""A trained model as a torch module: from a run, a checkpoint, an export, weights or a hub."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Generator, Tensor

from jemkit.attacks.pixel_model import PixelModel
from jemkit.backbone import Backbone
from jemkit.config.registry import Registry, installed
from jemkit.data import Bounds, Shape
from jemkit.errors import ConfigError, DataError, MisfitError
from jemkit.evaluation.export import save_model
from jemkit.evaluation.sample import SampleRequest, draw_samples, request_of, source_of
from jemkit.evaluation.weights import classes_in, fixed_shape, model_with, network_of, shape_in
from jemkit.models.energy import EnergyModel, Scores
from jemkit.runtime.files import load_tensors
from jemkit.runtime.labels import class_indices
from jemkit.runtime.precision import device_of
from jemkit.sampling.density import Density
from jemkit.sampling.init_dists import Start
from jemkit.training.model_folder import is_exported, pull
from jemkit.training.opened import Opened, Which, open_model
from jemkit.training.restore import Restored, restored


@dataclass(frozen=True, eq=False)
class Origin:
    """What a loaded model was read from; its copies share it."""

    opened: Opened  # without weights
    run: Restored
    device: torch.device
    registry: Registry

    def __deepcopy__(self, memo: Any) -> "Origin":
        return self


class LoadedModel(PixelModel):
    """The model that `load` returns: images [B, C, H, W] in [0, 1], or bytes, to logits [B, K].

    Images of 0..255 as floats are rejected. Evaluations use it without this check.
    """

    def __init__(
        self,
        model: EnergyModel,
        bounds: Bounds = Bounds(),
        density: Density | None = None,
        *,
        shape: Shape,
        n_classes: int,
        classes: tuple[str, ...] = (),
        origin: Origin | None = None,
    ) -> None:
        super().__init__(model, bounds, density)
        self.shape, self.n_classes = shape, n_classes
        self.classes = classes  # names in the order of the labels, if known
        self.origin = origin

    def scores(self, pixels: Tensor) -> Scores:
        """Scores of images [B, C, H, W] in [0, 1], or of bytes in 0..255; else DataError."""
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not (tracing or torch.compiler.is_compiling()):
            check_unit(pixels)
            if tuple(pixels.shape[1:]) != tuple(self.shape):
                hint = "" if self.origin else "; load the weights with the shape= of their images"
                raise DataError(
                    f"images {list(pixels.shape[1:])}: the model takes {list(self.shape)}, "
                    f"[C, H, W]{hint}"
                )
            if pixels.is_floating_point():  # as an array of float64 gives
                pixels = pixels.to(next((p.dtype for p in self.parameters()), pixels.dtype))
        return super().scores(pixels)

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits [B, K], as of a call of the module."""
        return self.scores(pixels).logits

    def predict_proba(self, pixels: Tensor) -> Tensor:
        """p(y | x), [B, K]."""
        return self.logits(pixels).softmax(dim=1)

    def energy(self, pixels: Tensor, y: Tensor | int | None = None) -> Tensor:
        """E(x), [B]; with labels y, [B] or one for all images, E(x, y). Low where likely."""
        scores = self.scores(pixels)
        if y is None:
            return scores.energy
        return scores.joint(self._labels(y, len(pixels)).to(pixels.device))

    def sample(
        self,
        n: int,
        rng: Generator | None = None,
        *,
        seed: int = 0,
        label: int | str | Sequence[int | str] | None = None,
        steps: int | None = None,
        start: str | Start | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """n images [n, C, H, W] in [0, 1], as `jemkit sample` draws them: the ends of new chains of
        the model's density, from its initial distribution by its sampler.

        `label` is a class, by number or name, several, over which the images are spread in order,
        or "all"; `y` [n] is the class of each. Such chains descend E(x, y), others E(x). `start` is
        another initial distribution. With `rng` the chains draw from it instead of from `seed`.

        Raises MisfitError for a classifier, ConfigError or UsageError for what cannot be drawn,
        DataError if the start needs images that are not there.
        """
        several: list[Any] = [label]
        if not isinstance(label, str) and isinstance(label, Iterable):
            several = [*label]
        elif label is None:
            several = []
        if several and y is not None:
            raise ConfigError("label and y both are classes of the images: pass one of them")
        request = self._request(n, several, seed=seed, steps=steps, start=start)
        if y is not None:
            request = request._replace(y=self._labels(y, n).to(request.device))
        if rng is not None:
            return super().sample(n, rng, steps=request.steps, start=request.start, y=request.y)
        return draw_samples(request).pixels.to(request.device)

    def _request(
        self, n: int, classes: list[int | str], *, seed: int, steps: int | None,
        start: str | Start | None,
    ) -> SampleRequest:  # fmt: skip
        density, device = self.density, next(self.parameters()).device
        if self.origin is None or self.origin.device != device:
            raise MisfitError(
                f"the model is on {device} and its chains are not: load it there, "
                f"jemkit.load(..., device={str(device)!r})"
            )
        origin, name = self.origin, start if isinstance(start, str) else None
        backbone = Backbone(self.model, density, bounds=self.bounds)
        request = request_of(
            source_of(origin.opened, origin.run._replace(backbone=backbone)),
            device, origin.registry, n=n, steps=steps, start=name, seed=seed,
            classes=[str(one) for one in classes],
        )  # fmt: skip
        if start is None or isinstance(start, str):
            return request
        if not isinstance(start, Start):
            raise ConfigError(
                f"start: got {type(start).__name__}, expected the name of an initial distribution "
                "or what has `draw`; options such as Uniform() have `build`, which gives it"
            )
        return request._replace(start=start)

    def save_pretrained(self, folder: str | Path, *, license: str | None = None) -> Path:
        """Write the model as a folder in the Hugging Face layout, as `jemkit export` does:
        config.json, model.safetensors and README.md, which `jemkit.from_pretrained` reads.

        Weights that were changed since they were loaded are saved as they are now, and without the
        figures of the run. Raises MisfitError for one of a file of weights, without a recipe;
        ConfigError if the folder is not empty.
        """
        if self.origin is None:
            raise MisfitError(
                "this model was loaded from a file of weights, which has no recipe: load the run "
                "or the exported model that they are from"
            )
        origin = self.origin
        save_model(
            origin.opened, self.model.state_dict(), Path(folder), origin.registry, license=license
        )
        return Path(folder)

    def _labels(self, y: Tensor | int, n: int) -> Tensor:
        """Labels [n] of n images, from one label for all or one for each."""
        labels = torch.as_tensor(y)
        labels = labels.reshape(1) if labels.ndim == 0 else labels
        labels = class_indices(labels, self.n_classes, "y")
        if len(labels) not in (1, n):
            raise DataError(f"y has {len(labels)} labels for {n} images: expected one for each")
        return labels.expand(n)

    def unchecked(self) -> PixelModel:
        return PixelModel(self.model, self.bounds, self.density_or_none, self.dtype)

    def extra_repr(self) -> str:
        return f"images {list(self.shape)} in [0, 1], {self.n_classes} classes"


FAR = 10.0  # images may exceed [0, 1] by noise; images of 0..255 have larger values


def check_unit(pixels: Tensor) -> None:
    """Refuse what is no batch of images, and images that are surely not in [0, 1], nor bytes."""
    if not isinstance(pixels, Tensor) or pixels.ndim != 4:
        came = list(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise DataError(f"got {came}: expected images as a tensor [B, C, H, W] in [0, 1]")
    if pixels.dtype == torch.uint8 or not pixels.numel() or pixels.is_meta:
        return
    if not pixels.is_floating_point():
        raise DataError(f"images of {pixels.dtype}: expected floats in [0, 1], or uint8 in 0..255")
    try:
        high = float(pixels.detach().max())
    except RuntimeError:  # inside torch.func.vmap nobody knows
        return
    if high > FAR:
        raise DataError(
            f"images with values up to {high:g}: expected floats in [0, 1], or uint8 in 0..255; "
            "divide pixels of 0..255 by 255"
        )


def load(
    path: str | Path,
    *,
    which: Which = "best",
    network: str | None = None,
    dataset: str | None = None,
    shape: Shape | None = None,
    registry: Registry | None = None,
    device: str = "cpu",
) -> LoadedModel:
    """The model of a run, a checkpoint, an exported or imported folder, or a file of weights: a
    torch module in eval mode that maps images in [0, 1] to logits.

    It has averaged weights if the run keeps them. A run has a `best` and a `last` checkpoint. No
    image is read; chains that start from Gaussians of a run's training images need jemkit's cache
    of them, an export, or the images. Nothing in the files is executed.

    A .safetensors file needs its `network`, such as "wrn-28-10"; `dataset` or `shape` says for
    which images it was made, if several fit.

    Raises DataError for a path that is missing, damaged or none of these, ConfigError for options
    or parts that do not fit it.
    """
    at, parts, on = Path(path).expanduser(), registry or installed(), device_of(device)
    if not at.exists():
        raise DataError(
            f"{at} does not exist; pass a run of `jemkit train`, a checkpoint folder, an exported "
            "model or a .safetensors file"
        )
    if not at.is_dir():
        return _of_weights(at, network, dataset, shape, parts, on).eval()
    if which not in get_args(Which):
        raise ConfigError(
            f"which={which!r}: a run has the checkpoints {' and '.join(get_args(Which))}"
        )
    if (network, dataset, shape) != (None, None, None):
        raise ConfigError(
            f"network, dataset and shape are only for a file of weights; {at} contains its own "
            "configuration"
        )
    opened = open_model(at, which)
    run = restored(opened, parts, on, without_images=True)
    placed = next(run.backbone.model.parameters()).device  # of "cuda" it is cuda:0
    origin = Origin(opened._replace(weights={}, state=None), run, placed, parts)
    names = run.pin.table.classes if run.pin is not None else None
    return LoadedModel(
        run.backbone.model, run.task.bounds, run.backbone.density_or_none, shape=run.task.shape,
        n_classes=run.task.n_classes, classes=names or (), origin=origin,
    ).eval()  # fmt: skip


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    registry: Registry | None = None,
    device: str = "cpu",
) -> LoadedModel:
    """The model of an exported folder, or of a repository of the Hugging Face hub, "me/model".

    The hub needs the extra `hub`. Only the files of an exported model are downloaded; nothing in
    them is executed, and their hashes are checked. A folder of this name comes first. Raises
    DataError if there is no such model, or it is damaged; ConfigError without the extra.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not REPOSITORY.fullmatch(str(name)):
            raise DataError(
                f"{name} is neither a folder nor the name of a repository of the Hugging Face hub, "
                "such as me/model"
            )
        folder = pull(str(name), revision)
    if not is_exported(folder):
        raise DataError(
            f"{name} is not an exported model of jemkit: it needs config.json and "
            "model.safetensors. `jemkit export` and `save_pretrained` write such a folder, and "
            "`jemkit.load` reads runs"
        )
    return load(folder, registry=registry, device=device)


REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def _of_weights(
    path: Path,
    name: str | None,
    dataset: str | None,
    shape: Shape | None,
    parts: Registry,
    device: torch.device,
) -> LoadedModel:
    if shape is not None and dataset is not None:
        raise ConfigError("dataset and shape both say for which images: pass one of them")
    network, weights = network_of(path, name, parts), load_tensors(path)
    if shape is None and dataset is not None:
        shape = fixed_shape(parts, dataset)
        if shape is None:
            raise ConfigError(
                f"the data set {dataset} has no fixed size of images: pass shape=(C, H, W)"
            )
    shape = shape or shape_in(path, weights, network, parts)
    n_classes = classes_in(path, weights)
    model = model_with(path, network, shape, n_classes, device)
    return LoadedModel(model, shape=shape, n_classes=n_classes)
