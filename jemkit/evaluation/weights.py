"""A file of weights without a recipe: a network of the registry, with JEM's energy."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Generator, Tensor

from jemkit.config.messages import explain
from jemkit.config.registry import Registry
from jemkit.data import Shape
from jemkit.errors import ConfigError, DataError
from jemkit.models.energy import LogSumExpEnergy
from jemkit.models.networks import NetworkSpec, seeded_init
from jemkit.runtime.files import load_tensors
from jemkit.training.build import load_model

HEAD = "head.weight"


def network_of(path: Path, name: str | None, registry: Registry) -> NetworkSpec:
    """The network of a file of weights by its registered name, such as wrn-28-10."""
    if path.suffix != ".safetensors":
        raise DataError(
            f"{path}: expected a run, a checkpoint folder, an exported model or a .safetensors "
            "file; `jemkit import` reads checkpoints of other programs"
        )
    if name is None:
        raise ConfigError(
            f"{path} contains only weights: specify their network, such as --network wrn-28-10"
        )
    part, named = registry["network"].named(name)
    numbers = {k: int(v) if v.isdecimal() else v for k, v in named.items()}
    try:
        options: Any = part.model_validate(numbers)
    except ValidationError as error:
        raise ConfigError(explain(error, {}, dict.fromkeys(named, "option"))) from None
    if not isinstance(options, NetworkSpec):
        raise ConfigError(f"the network {name} cannot be built")
    return options


def model_with(
    path: Path, network: NetworkSpec, shape: Shape, n_classes: int, device: torch.device
) -> LogSumExpEnergy:
    """A network for images of this shape, with the weights in the file."""
    with seeded_init(Generator(device).manual_seed(0)):
        built = network.build(shape)
    model = LogSumExpEnergy(built, n_classes).to(device)
    load_model(model, load_tensors(path))
    return model


def classes_in(path: Path, weights: dict[str, Tensor]) -> int:
    """The number of classes of a file of weights, by the size of its head."""
    head = weights.get(HEAD)
    if head is None or head.dim() != 2:
        raise DataError(
            f"{path} has no {HEAD} [classes, features], so it is not a network of jemkit: "
            "`jemkit import` reads checkpoints of other programs"
        )
    return len(head)


def shape_in(
    path: Path, weights: dict[str, Tensor], network: NetworkSpec, parts: Registry
) -> Shape:
    """The shape of images for which the weights were made, if one registered data set's fits."""
    shapes = {name: shape for name in parts["dataset"] if (shape := fixed_shape(parts, name))}
    fitting = {s for s in shapes.values() if _fits(weights, network, s)}
    if len(fitting) == 1:
        return fitting.pop()
    several = " and ".join(str(list(s)) for s in sorted(fitting))
    reason = f"images of {several} fit" if fitting else "no registered data set has images that fit"
    raise ConfigError(
        f"{path} does not say for which images it was made, and {reason}: pass shape=(C, H, W) or "
        "the name of the data set, dataset=..."
    )


def fixed_shape(registry: Registry, name: str) -> Shape | None:
    """The shape of a data set's images if it is known without reading them."""
    try:
        shape: Shape | None = getattr(registry["dataset"][name](), "shape", None)
    except ValidationError:  # it needs options
        return None
    return shape


def _fits(weights: dict[str, Tensor], network: NetworkSpec, shape: Shape) -> bool:
    """Whether the names and shapes of the weights are those of the network for such images."""
    try:
        with torch.device("meta"):  # no memory, no random numbers
            model = LogSumExpEnergy(network.build(shape), len(weights[HEAD]))
    except (RuntimeError, NotImplementedError, ValueError):  # it does not take such images
        return False
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return wanted == {name: tensor.shape for name, tensor in weights.items()}
