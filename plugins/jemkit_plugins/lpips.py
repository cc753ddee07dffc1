"""LPIPS (Zhang et al. 2018, v0.1): distance between the features of a frozen ImageNet network."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from jemkit import (
    Bounds, ConfigError, DataError, Distance, EnergyModel, Measure, MisfitError, Options,
    hookimpl,
)  # fmt: skip
from jemkit.training.pretrained.reading import loaded
from jemkit.runtime.files import load_arrays, load_tensors
from jemkit.runtime.opening import read_file
from jemkit.runtime.torchvision_compat import torchvision

MOST = 2 * 2**30
"""Largest size of a weights file in bytes; torchvision's VGG-16 has 530 million."""

TRUNKS = {  # torchvision's names of the weights for which the heads were trained
    "alex": "AlexNet_Weights",
    "vgg": "VGG16_Weights",
    "squeeze": "SqueezeNet1_1_Weights",
}


class LPIPS(Options):
    """Perceptual distance d(x, x~): P in the papers' tables."""

    min_size: ClassVar[int] = 31  # AlexNet's last pooling needs this size

    net: Literal["alex", "vgg", "squeeze"] = "alex"  # the network of the features
    weights: Path | None = None  # .pth, .safetensors or .npz; else torchvision's cache
    download: bool = False  # fetch missing weights

    def unused(self) -> dict[str, str]:
        return {} if self.weights is None else {"download": "where weights are given"}

    def bind(self, model: EnergyModel, x: Tensor, bounds: Bounds) -> Measure:
        _fits(x)
        perceptual = network(self, x.device, x.dtype)
        with torch.no_grad():
            clean = list(perceptual.features(_network_input(x, bounds)))

        def measure(x_adv: Tensor) -> Tensor:
            return perceptual.compare(clean, _network_input(x_adv, bounds))

        return measure


@hookimpl
def jemkit_distances() -> Mapping[str, type[Distance]]:
    return {"lpips": LPIPS}


class Perceptual(nn.Module):
    """The network of the lpips package, split into two passes; frozen and in eval mode."""

    def __init__(self, package: nn.Module) -> None:
        super().__init__()
        self.scale = package.get_submodule("scaling_layer")
        self.slices = nn.ModuleList(package.get_submodule("net").children())
        self.heads = nn.ModuleList(package.get_submodule("lins").children())
        self.requires_grad_(False).eval()

    def features(self, x: Tensor) -> Iterator[Tensor]:
        """Maps images [B, 3, H, W] in [-1, 1] to the unit features [B, D, h, w] of each layer."""
        h = self.scale(x)
        for layer in self.slices:
            h = layer(h)
            yield h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10)

    def compare(self, clean: list[Tensor], x_adv: Tensor) -> Tensor:
        """The sum over layers of the weighted squared differences, averaged over positions, [B]."""
        total = x_adv.new_zeros(len(x_adv))
        for head, ours, theirs in zip(self.heads, clean, self.features(x_adv), strict=True):
            total = total + head((ours - theirs).square()).mean((1, 2, 3))
        return total


@lru_cache(maxsize=4)
def network(spec: LPIPS, device: torch.device, dtype: torch.dtype) -> Perceptual:
    """Build the network of these options, once per device and precision."""
    source, weights = _trunk_weights(spec)
    package = _package(spec.net)
    _fill(package, spec, weights, source)
    with torch.inference_mode(False):
        return Perceptual(package).to(device, dtype)


def _fits(x: Tensor) -> None:
    channels, height, width = x.shape[1:]
    if channels not in (1, 3):
        raise MisfitError(f"lpips needs grey or colour images, got {channels} channels")
    if min(height, width) < LPIPS.min_size:
        raise MisfitError(
            f"lpips needs images of at least {LPIPS.min_size} px, got {height} x {width}; "
            "use the distance `none`, `l2` or `logits`"
        )


def _network_input(x: Tensor, bounds: Bounds) -> Tensor:
    """Images in [-1, 1] with three channels, as the network was trained."""
    middle, half = (bounds.high + bounds.low) / 2, (bounds.high - bounds.low) / 2
    return ((x - middle) / half).expand(-1, 3, -1, -1)


def _package(net: str) -> nn.Module:
    """The package's network with its own heads and an untrained trunk; nothing is downloaded."""
    torchvision()  # first, since the package imports it on its own
    try:
        import lpips
    except ImportError as error:
        raise ConfigError(
            f"the distance lpips needs the package lpips ({error}): pip install lpips"
        ) from error
    # Its random trunk is replaced; the fork leaves the global generator unchanged.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    return built


def _trunk_weights(spec: LPIPS) -> tuple[str, dict[str, Tensor]]:
    """The trunk's weights and their source: the path, torchvision's cache or a download."""
    if spec.weights is not None:
        path = spec.weights.expanduser()
        if not path.is_file():
            raise DataError(f"{path}: missing; expected the weights of LPIPS's {spec.net} trunk")
        return str(path), _read(path)
    enum = getattr(torchvision().models, TRUNKS[spec.net]).IMAGENET1K_V1
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(enum.url).name
    if cached.is_file():
        return str(cached), _read(cached)
    if not spec.download:
        raise ConfigError(
            f"lpips has no weights for its {spec.net} trunk: {cached} does not exist. Put "
            f"{enum.url} there, or give `weights` a .pth, .safetensors or .npz file, or ask with "
            "`download = true`. The distances `none`, `l2` and `logits` need no weights"
        )
    logging.getLogger("jemkit").info("downloading %s", enum.url)
    try:
        return enum.url, enum.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise DataError(f"{enum.url}: the download failed ({error})") from error


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, read without executing anything in it."""
    try:
        match path.suffix:
            case ".npz":
                return load_arrays(path, MOST)
            case ".safetensors":
                return load_tensors(path, MOST)
            case ".pth" | ".pt":
                return _state_dict(loaded(read_file(path, MOST)))
    except (DataError, OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as weights ({error})") from error
    raise DataError(f"{path}: expected a .pth, .safetensors or .npz file of weights")


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise TypeError(f"expected a dictionary of tensors, got {type(loaded).__name__}")
    return dict(loaded)


def _fill(package: nn.Module, spec: LPIPS, weights: dict[str, Tensor], source: str) -> None:
    """Load a file's weights into the network: the whole trunk, and the heads if it has them."""
    slots = {_file_name(name): slot for name, slot in package.named_parameters()}
    if not any(name.startswith("lin") for name in weights):
        slots = {name: slot for name, slot in slots.items() if not name.startswith("lin")}
    given = {name: w for name, w in weights.items() if not name.startswith("classifier.")}
    wanted = f"expected torchvision's names for the {spec.net} trunk"
    if missing := [name for name in slots if name not in given]:
        raise DataError(f"{source}: {wanted}, missing {_some(missing)}")
    if unknown := [name for name in given if name not in slots]:
        raise DataError(f"{source}: {wanted}, got additionally {_some(unknown)}")
    for name, slot in slots.items():
        if given[name].shape != slot.shape:
            came, shape = list(given[name].shape), list(slot.shape)
            raise DataError(f"{source}: {name} is {came}, the {spec.net} trunk expects {shape}")
        if not given[name].isfinite().all():
            raise DataError(f"{source}: {name} holds NaN or inf")
        with torch.no_grad():
            slot.copy_(given[name])


def _file_name(parameter: str) -> str:
    """net.slice2.3.weight is features.3.weight in torchvision; the heads keep their names."""
    if parameter.startswith("net."):
        return "features." + parameter.split(".", 2)[2]
    return parameter


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
