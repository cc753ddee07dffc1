"""The error of an energy's gradient in each precision: against float64, at the network's shapes."""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jemkit.config.recipe import Resolved
from jemkit.errors import DataError
from jemkit.models.energy import EnergyModel, ModelEnergy
from jemkit.runtime.modes import sampling_mode
from jemkit.runtime.precision import Precision, numerics
from jemkit.runtime.run_dir import versions
from jemkit.sampling.kernels import eager_gradient
from jemkit.training.build import RunState


class Accuracy(NamedTuple):
    """The error of dE/dx in one precision."""

    precision: Precision
    median: float  # of the images' relative errors, |g - g64| / |g64| in the L2 norm
    worst: float
    flipped: float  # share of all pixels whose sign differs, which matters to signed steps
    images: int


def accuracy_of(parts: RunState, images: int = 16) -> list[Accuracy]:
    """Each precision of the device on the first images of a batch, against float64.

    The model is that of a chain: frozen, with batch statistics. tf32 needs a GPU.
    """
    x = parts.loader.batch().x[:images]
    cuda = parts.device.type == "cuda"
    kinds: tuple[Precision, ...] = ("fp32", "tf32", "bf16") if cuda else ("fp32", "bf16")
    exact = reference(parts.backbone.model, x)
    return [errors(kind, _gradient(parts.backbone.model, x, kind), exact) for kind in kinds]


def protocol(resolved: Resolved, parts: RunState, accuracies: list[Accuracy]) -> dict[str, Any]:
    tables, run = resolved.tables, resolved.recipe.run
    return {
        "images": accuracies[0].images,
        "selection": f"the first of {tables['data']['use']}'s first batch, augmented",
        "model": f"{tables['backbone']['use']}, newly initialised, with batch statistics",
        "network": tables["backbone"].get("network", {}),
        "error": "|g - g64| / |g64| of g = dE/dx, image by image, against float64",
        "norm": "L2",
        "seed": run.seed,
        "device": str(parts.device),
        "versions": versions(),
    }


def reference(model: EnergyModel, x: Tensor) -> Tensor:
    """dE/dx [B, C, H, W] of a copy of the model in float64."""
    return _gradient(deepcopy(model).double(), x.double(), "fp32")


def errors(precision: Precision, values: Tensor, exact: Tensor) -> Accuracy:
    """The errors of gradients [B, ...] against exact ones; DataError if one is undefined."""
    size = exact.flatten(1).norm(dim=1)
    relative = (values.double() - exact).flatten(1).norm(dim=1) / size
    if not relative.isfinite().all():
        raise DataError(
            f"no relative error in {precision} for {int((~relative.isfinite()).sum())} of "
            f"{len(relative)} images: their gradient is 0 or not finite; use another network or "
            f"other images"
        )
    flipped = (values.sign() != exact.sign()).double().mean()
    return Accuracy(
        precision, float(relative.median()), float(relative.max()), float(flipped), len(exact)
    )


def _gradient(model: EnergyModel, x: Tensor, precision: Precision) -> Tensor:
    autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16")
    with numerics(precision=precision), sampling_mode(model, "batch_stats"), autocast:
        return eager_gradient(ModelEnergy(model), x)
