"""Models to evaluate: a run, a checkpoint, an exported model, weights, any module."""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from jemkit.attacks.pixel_model import PixelModel, in_own_type, pixel_model, with_gradient
from jemkit.config.recipe import resolve
from jemkit.config.registry import Registry
from jemkit.data import Dataset, Images, Shape, checked
from jemkit.errors import ConfigError, DataError, MisfitError
from jemkit.evaluation.user_code import (
    AS_BUILT,
    Code,
    Preparation,
    code_of,
    described,
    first_pass,
    prepared_module,
)
from jemkit.evaluation.weights import model_with, network_of
from jemkit.metrics.identity import identity_of
from jemkit.options import Options
from jemkit.runtime.files import file_hash
from jemkit.runtime.labels import count_classes
from jemkit.runtime.modes import eval_mode, preserved_random_state
from jemkit.sampling.density import Buffered
from jemkit.splits import Splits
from jemkit.training.opened import Which, open_model
from jemkit.training.reshard import gather_state
from jemkit.training.restore import about_parts, is_own, restored

log = logging.getLogger(__name__)


class EvalTarget(NamedTuple):
    """A model with the images on which it is evaluated, and its origin."""

    model: PixelModel
    test: Images
    n_classes: int
    radius_px: float  # the default of the data set, in L-infinity
    images: Callable[[str], Images] | None  # of "train" and "valid"
    about: dict[str, Any]
    folder: Path | None  # folder of its record
    others: Callable[[], dict[str, Images]] = dict  # test images of other data sets beside its own
    trained_on: int = 0  # number of test images on which it was trained or validated
    warnings: tuple[str, ...] = ()
    threads: int | None = None  # of the CPU, from its recipe; None: torch's own choice
    known_splits: bool = False  # whether it was not trained on the validation images


def subject_at(
    path: Path,
    registry: Registry,
    device: torch.device,
    *,
    which: Which = "best",
    network: str | None = None,
    dataset: dict[str, Any] | None = None,
    preparation: Preparation = AS_BUILT,
) -> EvalTarget:
    """The model at a path; `dataset` replaces the data set on which it was trained.

    A .safetensors file, which has only weights, needs a `network`. The `preparation` is that of a
    module which Python code builds, my.py:build; this code is run.
    """
    code = code_of(path)
    _check_options(path, code, network, preparation)
    if which == "last" and (code is not None or not path.is_dir()):
        raise ConfigError(f"only a run has a last checkpoint; {path} holds one set of weights")
    if code is not None:
        return _of_code(code, preparation, registry, device, dataset)
    if not path.is_dir():
        return _weights(path, registry, device, network, dataset)
    if network is not None:
        raise ConfigError(
            f"--network is only for a file of weights; {path} contains its own configuration"
        )
    opened = open_model(path, which)
    run = restored(opened, registry, device, dataset)
    backbone, test = run.backbone, run.splits.images("test")
    density, own = backbone.density_or_none, is_own(dataset)
    if isinstance(density, Buffered) and own and opened.state is not None:
        with suppress(MisfitError):  # several processes may have saved parts that cannot be joined
            density.load_state_dict(gather_state(opened.state, density))
    trained_on, warnings = run.pin.overlap(test) if run.pin else (0, [])
    return EvalTarget(
        PixelModel(backbone.model, run.task.bounds, density),
        test,
        run.task.n_classes,
        run.recipe.data.radius_px,
        run.splits.images,  # type: ignore[arg-type]
        {**opened.about, **about_parts(run.tables, run.recipe, run.trained_px)},
        opened.folder,
        others_of(run.recipe.data, registry),
        trained_on,
        tuple(warnings),
        run.recipe.run.threads,
        known_splits=run.pin is not None and run.pin.table.train is not None,
    )


def _check_options(
    path: Path, code: Code | None, network: str | None, preparation: Preparation
) -> None:
    """Reject a path that does not exist, and options that it does not take."""
    if code is not None and network is not None:
        raise ConfigError(f"--network is only for a file of weights; {code} builds its own network")
    if code is None and preparation != AS_BUILT:
        raise ConfigError(
            f"--weights, --key, --mean and --std are for a model that Python code builds, "
            f"my.py:build; {path} is none"
        )
    if code is None and not path.exists():
        raise DataError(
            f"{path} does not exist; pass a run of `jemkit train`, a checkpoint folder, an "
            "exported model, a .safetensors file or Python code, my.py:build"
        )


def subject_of(
    module: nn.Module, dataset: Dataset | Images, n_classes: int | None = None
) -> EvalTarget:
    """Any module that maps [0, 1] images to logits, with a data set or labelled images."""
    named = dataset if isinstance(dataset, Dataset) else None
    test = named.load("test") if named else _images(dataset)
    if not test.y.numel():
        raise DataError("there are no images to evaluate the model on")
    if n_classes is not None and n_classes < 2:
        raise ConfigError(f"n_classes = {n_classes}: expected 2 or more, or omit it")
    known = n_classes or (named.n_classes if named else None)
    test = checked(test, known or count_classes(test.y), "the test images")
    identity, plain = identity_of(module), pixel_model(module)
    device = next((p.device for p in plain.parameters()), torch.device("cpu"))
    first = test.take(torch.arange(min(2, len(test.y)))).to(device).unit()
    with eval_mode(plain), preserved_random_state():
        plain = in_own_type(plain, first)
        classes = known or _width(plain, first)
        model = with_gradient(plain, first)
    source = "the test images" if known else f"the test images of a model of {classes} outputs"
    test = checked(test, classes, source)
    about = {"model": type(module).__name__, "sha256": identity.sha256, **identity.card}
    return EvalTarget(
        model,
        test,
        classes,
        named.radius_px if named else 8.0,
        Splits(named).images if named else None,  # type: ignore[arg-type]
        {**about, "trained_radius_px": None},
        None,
    )


def _width(model: PixelModel, pixels: Tensor) -> int:
    """The number of classes of a model, by its outputs."""
    with torch.no_grad():
        classes = int(model(pixels).shape[1])
    if classes < 2:
        raise MisfitError(
            "the model returns one output per image, but logits have one for each class: for two "
            "classes return [N, 2], such as torch.cat([-z, z], 1) of an output z before its sigmoid"
        )
    return classes


def _images(given: Any) -> Images:
    """Labelled images, also from a pair or arrays."""
    try:
        x, y = given
        x, y = _tensor(x), _tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"expected a data set, or images [N, C, H, W] with labels [N]; got "
            f"{type(given).__name__} ({str(error).splitlines()[0]})"
        ) from None
    return Images(x, y)


def _tensor(given: Any) -> Tensor:
    """Tensors, arrays with any memory layout, and sequences of them."""
    if isinstance(given, Tensor):
        return given.detach()
    if isinstance(given, list | tuple) and given and isinstance(given[0], Tensor):
        return torch.stack([part.detach() for part in given])
    array = np.asarray(given)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def others_of(dataset: Dataset, registry: Registry) -> Callable[[], dict[str, Images]]:
    """The test images of other data sets with the same shape whose files are in the same folder."""

    def read() -> dict[str, Images]:
        images_of: dict[str, Images] = {}
        unread: dict[str, list[str]] = {}
        folder = getattr(dataset, "dir", None)
        for name, part in registry["dataset"].items():
            if folder is None or part is type(dataset) or "dir" not in part.model_fields:
                continue
            try:
                other = part(dir=folder, **_reduced(dataset, part))
                images = checked(other.load("test"), other.n_classes, name)
            except (DataError, ValidationError):  # its files are missing
                continue
            except ConfigError as error:  # a package that reads it is missing
                unread.setdefault(str(error), []).append(name)
                continue
            if images.x.shape[1:] == dataset.load("test").x.shape[1:]:
                images_of[name] = images
        for why, names in unread.items():
            log.warning("images of %s in %s are skipped: %s", ", ".join(names), folder, why)
        return images_of

    return read


def _reduced(dataset: Dataset, part: type[Options]) -> dict[str, int]:
    """The data set's own size for another published one, whose default is a number."""
    usual, size = part.model_fields.get("size"), getattr(dataset, "size", None)
    return {"size": size} if usual and isinstance(usual.default, int) and size else {}


def _of_code(
    code: Code,
    how: Preparation,
    registry: Registry,
    device: torch.device,
    dataset: dict[str, Any] | None,
) -> EvalTarget:
    data: Dataset = resolve(registry, named={"data": dataset} if dataset else {}).recipe.data
    name = registry["dataset"].name_of(type(data))
    module = prepared_module(code, how, data, device)
    with first_pass(code, name):
        target = subject_of(module, data)
    about = {**target.about, **described(code, how, name)}
    folder = code.file.with_name(f"{code.file.stem}-evaluation")
    return target._replace(about=about, folder=folder)


def _weights(
    path: Path,
    registry: Registry,
    device: torch.device,
    network: str | None,
    dataset: dict[str, Any] | None,
) -> EvalTarget:
    spec = network_of(path, network, registry)
    data: Dataset = resolve(registry, named={"data": dataset} if dataset else {}).recipe.data
    shape: Shape = tuple(data.load("test").x.shape[1:])  # type: ignore[assignment]
    model = model_with(path, spec, shape, data.n_classes, device)
    name = registry["dataset"].name_of(type(data))
    about = {"file": path.name, "network": network, "data": name, "trained_radius_px": None}
    target = subject_of(PixelModel(model), data)
    sha = file_hash(path)
    folder = path.with_name(f"{path.stem}-evaluation")
    return target._replace(about={**about, "sha256": sha}, folder=folder)
