"""Where chains begin: p_0."""

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Generator, Tensor

from jemkit.data import Bounds, Images
from jemkit.errors import ConfigError
from jemkit.options import Options
from jemkit.runtime.files import cache_folder, load_tensors, write_tensors

if TYPE_CHECKING:
    from jemkit.backbone import Task

log = logging.getLogger("jemkit")
JITTER = 1e-4
"""Added to a covariance's diagonal, as JEM++ does, so that few images still give a full rank."""


@runtime_checkable
class Start(Protocol):
    """A distribution that chains begin from."""

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        """n images [n, C, H, W] in the model's range, of the classes y [n] where it knows any."""
        ...


@runtime_checkable
class StartSpec(Protocol):
    """A start's options; a registered part."""

    def build(self, task: "Task", device: torch.device) -> Start: ...


class Uniform(Options):
    """Uniform pixels, JEM's start."""

    def build(self, task: "Task", device: torch.device) -> Start:
        return UniformStart(task.shape, task.bounds)


class Noise(Options):
    """Independent normal pixels around the middle of the range, clamped to it."""

    std: float = Field(1.0, gt=0)

    def build(self, task: "Task", device: torch.device) -> Start:
        return NoiseStart(task.shape, task.bounds, self.std)


class Gaussian(Options):
    """One Gaussian with the mean and covariance of the training images, M-EBM's start."""

    def build(self, task: "Task", device: torch.device) -> Start:
        return GaussianStart(*moments(task, classwise=False, device=device), task)


class Mixture(Options):
    """A Gaussian a class, JEM++'s informative initialisation."""

    def build(self, task: "Task", device: torch.device) -> Start:
        return GaussianStart(*moments(task, classwise=True, device=device), task)


class UniformStart:
    def __init__(self, shape: tuple[int, int, int], bounds: Bounds) -> None:
        self.shape, self.bounds = shape, bounds

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        u = torch.rand((n, *self.shape), generator=rng, device=rng.device)
        return self.bounds.from_unit(u)


class NoiseStart:
    def __init__(self, shape: tuple[int, int, int], bounds: Bounds, std: float) -> None:
        self.shape, self.bounds, self.std = shape, bounds, std

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        z = torch.randn((n, *self.shape), generator=rng, device=rng.device)
        return self.bounds.clamp(sum(self.bounds) / 2 + self.std * z)


GATHERED = 2**28
"""Numbers of Cholesky factors that are gathered at a time: 1 GiB of float32."""


class GaussianStart:
    """x = m_k + L_k z, L_k the Cholesky factor of class k's covariance; clamped to the range."""

    def __init__(self, means: Tensor, factors: Tensor, task: "Task") -> None:
        self.means, self.factors = means, factors  # [K, D], [K, D, D] lower triangular
        self.shape, self.bounds = task.shape, task.bounds

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        k = len(self.means)
        z = torch.randn((n, self.means.shape[1]), generator=rng, device=rng.device)
        if k == 1:
            x = self.means + z @ self.factors[0].T
        else:
            if y is None:
                y = torch.randint(k, (n,), generator=rng, device=rng.device)
            x = self._by_class(z, y) if z.device.type == "cpu" else self._gathered(z, y)
        return self.bounds.clamp(x).view(n, *self.shape)

    def _by_class(self, z: Tensor, y: Tensor) -> Tensor:
        """One matrix product a class, so that each factor is read once; the host knows y."""
        x = torch.empty_like(z)
        for label in torch.unique(y).tolist():
            rows = y == label
            x[rows] = self.means[label] + (self.factors[label] @ z[rows].T).T
        return x

    def _gathered(self, z: Tensor, y: Tensor) -> Tensor:
        """A batched product in pieces; on a GPU, where reading y back would stop the device."""
        rows = max(1, GATHERED // self.factors[0].numel())
        pieces = [
            self.means[label] + torch.bmm(self.factors[label], part.unsqueeze(2)).squeeze(2)
            for part, label in zip(torch.split(z, rows), torch.split(y, rows), strict=True)
        ]
        return torch.cat(pieces)


class Labelled:
    """A start that always begins with these classes."""

    def __init__(self, start: Start, y: Tensor) -> None:
        self.start, self.y = start, y

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        return self.start.draw(n, rng, self.y[:n] if y is None else y)


def moments(task: "Task", *, classwise: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Means [K, D] and Cholesky factors [K, D, D] of un-augmented training images.

    In the model's range; cached under the hash of the data, since a covariance takes a while.
    """
    kind = "mixture" if classwise else "gaussian"
    key = hashlib.sha256(f"{task.hash} {tuple(task.bounds)} {kind} {JITTER}".encode())
    path = cache_folder() / "moments" / f"{key.hexdigest()[:32]}.safetensors"
    found = load_tensors(path) if path.exists() else None
    if found is None or set(found) != {"means", "factors"}:
        found = _estimate(task, classwise)
        _keep(path, found)
    return found["means"].to(device), found["factors"].to(device)


def _keep(path: Path, found: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, found)
    except OSError as error:
        log.warning("the moments of the data could not be kept in %s: %s", path, error)


def _estimate(task: "Task", classwise: bool) -> dict[str, Tensor]:
    images = task.images("train")
    x = task.bounds.from_unit(images.unit()).flatten(1)
    groups = [x[images.y == k] for k in range(task.n_classes)] if classwise else [x]
    empty = [k for k, group in enumerate(groups) if not len(group)]
    if empty:
        raise ConfigError(
            f"no training image of class {', '.join(map(str, empty[:5]))}, so it has no Gaussian; "
            "use more images (run.max_train) or backbone.start.use=gaussian"
        )
    pairs = [gaussian(group) for group in groups]
    means, factors = zip(*pairs, strict=True)
    return {"means": torch.stack(means), "factors": torch.stack(factors)}


def gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [D] of rows [N, D], and the Cholesky factor of their covariance (divided by N)."""
    mean = x.mean(dim=0)
    centred = x - mean
    covariance = (centred.T @ centred).double() / len(x)
    covariance.diagonal().add_(JITTER)
    return mean, torch.linalg.cholesky(covariance).float()


def images_hash(images: Images) -> str:
    """SHA-256 of a set's pixels, labels and shapes."""
    digest = hashlib.sha256(f"{list(images.x.shape)} {images.x.dtype}".encode())
    digest.update(images.x.contiguous().numpy().tobytes())
    digest.update(images.y.contiguous().numpy().tobytes())
    return digest.hexdigest()


def start_name(start: Start) -> str:
    """A start as a protocol card names it: as it is registered, where its class is named so."""
    if isinstance(start, GaussianStart) and len(start.means) > 1:
        return "mixture"
    return type(start).__name__.removesuffix("Start").lower()
