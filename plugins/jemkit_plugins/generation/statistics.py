"""Statistics of a reference set for FID: mean and scatter of its features, computed once."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jemkit import ConfigError, Context, DataError, Images
from jemkit.attacks.base import Threat
from jemkit.data import images_hash
from jemkit.metrics.evaluator import no_progress
from jemkit.metrics.plots import to_bytes
from jemkit.runtime.files import load_tensors, write_tensors
from jemkit.runtime.rng import generator
from jemkit_plugins.generation import features, fid
from jemkit_plugins.generation.features import PIECE, Features, extracted


class Statistics(NamedTuple):
    """The moments of a set of images in some features."""

    moments: fid.Moments
    about: dict[str, Any]  # the protocol of the features and of the images

    def check(self, network: Features, shape: tuple[int, ...]) -> None:
        """Raise ConfigError unless these are statistics of such images in these features."""
        own = self.about["features"]
        if own["sha256"] != network.card["sha256"]:
            raise ConfigError(
                f"these statistics are of the features of {own['extractor']} (SHA-256 "
                f"{own['sha256'][:8]}), and the samples' are of {network.card['extractor']} "
                f"({network.card['sha256'][:8]}): compute them again with `jemkit fid-stats`"
            )
        if tuple(self.about["shape"]) != tuple(shape):
            raise ConfigError(
                f"these statistics are of images {self.about['shape']}, and the samples are "
                f"{list(shape)}: compute them for images of that shape with `jemkit fid-stats`"
            )


def measured(images: Images, network: Features, ctx: Context, about: dict[str, Any]) -> Statistics:
    """The statistics of images; with `ctx.work` an interrupted computation continues."""
    x = images.x if images.x.dtype == torch.uint8 else to_bytes(images.x)
    rows = extracted(network, x.cpu(), ctx, "features").features
    card = {
        **about,
        "features": network.card,
        "shape": list(x.shape[1:]),
        "count": len(x),
        "sha256": images_hash(images),
    }
    return Statistics(fid.moments(torch.split(rows, PIECE)), card)


def write_of(
    images: Images,
    out: Path,
    about: dict[str, Any],
    *,
    inception: Path | None,
    device: torch.device,
    batch_size: int,
    progress: Callable[[str, int, int], None] | None,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """Measure images in Inception's features and write the file; returns its description.

    Unfinished work is beside the file: the same call continues it.
    """
    if out.is_dir():
        raise DataError(f"{out} is a folder; name a file, such as {out / 'statistics.safetensors'}")
    network = features.inception(features.inception_file(inception), device)
    work = out.parent / f".{out.name}.work"
    ctx = Context(
        generator(device, 0), Threat("Linf", 0.0), batch_size=batch_size, work=work, stop=stop,
        progress=progress or no_progress,
    )  # fmt: skip
    if len(images.y) < fid.FULL_RANK:
        logging.getLogger("jemkit").warning(
            "statistics of %d images, under %s: the covariance of Inception's features does not "
            "have full rank, and a FID against it does not compare with others",
            len(images.y), f"{fid.FULL_RANK:,}",
        )  # fmt: skip
    result = measured(images, network, ctx, about)
    write(out, result)
    for cache in ctx.notes.caches:
        cache.remove()
    return result.about


def write(path: Path, statistics: Statistics) -> None:
    """A safetensors file of the moments, with `about` as JSON in bytes."""
    about = json.dumps(statistics.about, sort_keys=True).encode()
    moments = statistics.moments
    write_tensors(path, {
        "n": torch.tensor(moments.n), "mean": moments.mean, "scatter": moments.scatter,
        "about": torch.frombuffer(bytearray(about), dtype=torch.uint8),
    })  # fmt: skip


def read(path: Path) -> Statistics:
    """The moments that `write` stored; DataError for any other file."""
    tensors = load_tensors(path)
    try:
        about = json.loads(bytes(tensors["about"].tolist()))
        moments = fid.Moments(int(tensors["n"]), tensors["mean"], tensors["scatter"])
        sound = _sound(moments) and {"extractor", "sha256"} <= set(about["features"])
        if not sound or not {"shape", "count", "sha256"} <= set(about):
            raise ValueError("its moments or their description are not complete")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} has no statistics of `jemkit fid-stats`: {type(error).__name__}: {error}"
        ) from None
    return Statistics(moments, about)


def _sound(moments: fid.Moments) -> bool:
    mean: Tensor = moments.mean
    square = moments.scatter.shape == (len(mean), len(mean)) and moments.n >= 2
    return square and bool(mean.isfinite().all() and moments.scatter.isfinite().all())
