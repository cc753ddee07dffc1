"""Imports torchvision, whose compiled operators may not load with this torch."""

import logging
from functools import cache
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch.library import Library

from jemkit.errors import ConfigError

# torchvision registers fake kernels for these by name when it is imported, and fails where the
# compiled library that declares them was built for another torch (a CUDA build beside a CPU one).
OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def torchvision() -> ModuleType:
    """The package torchvision, with its datasets and models; imported on the first call.

    Packages that import torchvision themselves, such as timm, load after this call also where its
    compiled operators were built for another torch. ConfigError if it cannot be imported.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "torchvision is not installed; every data set but `digits`, and the distance `lpips`, "
            "need it: pip install torchvision"
        )
    _load_operators(Path(spec.origin).parent)
    _declare_missing()
    try:
        return import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"torchvision {version('torchvision')} cannot be imported with torch "
            f"{torch.__version__} ({error}); install matching versions"
        ) from error


@cache
def _load_operators(package: Path) -> None:
    """Load the compiled operators if they fit this torch; the real ones take precedence."""
    finder = FileFinder(str(package), (ExtensionFileLoader, EXTENSION_SUFFIXES))
    library = finder.find_spec("_C")
    if library is None or library.origin is None:
        return
    try:
        torch.ops.load_library(library.origin)  # type: ignore[no-untyped-call]
    except (ImportError, OSError) as error:
        logging.getLogger("jemkit").debug("torchvision's operators: %s", error)


@cache
def _declare_missing() -> Library | None:
    """Declare missing operators without a kernel; they last as long as the cached library."""
    missing = [name for name in OPERATORS if getattr(torch.ops.torchvision, name, None) is None]
    if not missing:
        return None
    library = Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in missing:
        library.define(OPERATORS[name])  # type: ignore[no-untyped-call]
    logging.getLogger("jemkit").info(
        "torchvision's compiled operators do not load with torch %s; data sets and models do not "
        "need them, so %s are declared without a kernel",
        torch.__version__,
        " and ".join(missing),
    )
    return library
