"""Data: pixel bounds, image sets, their loader, and the two views of a batch."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Generator, Tensor

from jemkit.errors import ConfigError, DataError
from jemkit.options import SIZES, Options
from jemkit.runtime.labels import class_indices
from jemkit.runtime.work_cache import WHOLE, Shard

Split = Literal["train", "test"]
"""The splits of a data set; validation images are a part of the training split."""


class Bounds(NamedTuple):
    """The pixel range of a model's input; (-1, 1) inside jemkit, (0, 1) for users."""

    low: float = -1.0
    high: float = 1.0

    def px(self, size: float) -> float:
        """A size given in 1/255 of the pixel range, in tensor units."""
        return size / 255 * (self.high - self.low)

    def clamp(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)

    def from_unit(self, x: Tensor) -> Tensor:
        """[0, 1] pixels to this range."""
        return self.low + (self.high - self.low) * x

    def to_unit(self, x: Tensor) -> Tensor:
        """This range to [0, 1] pixels."""
        return (x - self.low) / (self.high - self.low)


class Images(NamedTuple):
    """A labelled set of images, as it is stored."""

    x: Tensor  # [N, C, H, W], uint8 in 0..255 or float32 in [0, 1]
    y: Tensor  # [N], int64

    def unit(self) -> Tensor:
        """All images as float32 in [0, 1]."""
        return self.x.float() / 255 if self.x.dtype == torch.uint8 else self.x.float()

    def take(self, index: Tensor | slice) -> "Images":
        """The images and labels of these rows: indices [N], a mask [N] or a slice."""
        return Images(self.x[index], self.y[index])

    def to(self, device: torch.device) -> "Images":
        return Images(self.x.to(device), self.y.to(device))


class Augmentation(NamedTuple):
    """The augmentation of an image: reflect-padded crops and flips."""

    pad: int = 0  # pixels
    flip: bool = False


@runtime_checkable
class Dataset(Protocol):
    """A source of labelled images; a registered part, so its fields are its options."""

    radius_px: ClassVar[float]  # L-inf, the usual threat model, in 1/255

    @property
    def augmentation(self) -> Augmentation:
        """A class variable satisfies it too."""

    @property
    def n_classes(self) -> int:
        """The number of classes, K."""

    def load(self, split: Split) -> Images:
        """Read one split whole. Raises DataError with the file that is missing or damaged."""


@runtime_checkable
class NamesClasses(Protocol):
    """A data set with class names."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class, in the order of the labels."""


@runtime_checkable
class OffersValidation(Protocol):
    """A data set that may have its own validation images."""

    def validation(self) -> Images | None:
        """They replace a share of the training split; None if there are none."""


def images_hash(images: Images) -> str:
    """SHA-256 of a set's pixels, labels and shapes."""
    digest = hashlib.sha256(f"{list(images.x.shape)} {images.x.dtype}".encode())
    digest.update(images.x.contiguous().numpy().tobytes())
    digest.update(images.y.contiguous().numpy().tobytes())
    return digest.hexdigest()


def checked(images: Images, n_classes: int, source: str) -> Images:
    """The images in the types in which they are stored, or a DataError that says what is wrong.

    Pixels become float32 or stay uint8; labels become int64, also from whole numbers of another
    type, a column [N, 1], or one-hot rows.
    """
    try:
        x, y = (torch.as_tensor(part) for part in images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{source}: expected images and labels as tensors ({error})") from None
    _check_shape(x, len(y) if y.ndim else 1, source)
    y = class_indices(y, n_classes, source)
    return Images(_floats(x, source) if x.is_floating_point() else _bytes(x, source), y)


def _check_shape(x: Tensor, n_labels: int, source: str) -> None:
    if x.layout != torch.strided:
        raise DataError(f"{source}: expected dense images, got {x.layout}: x.to_dense()")
    if x.is_meta:
        raise DataError(f"{source}: the images are on the device meta and have no pixels")
    if x.ndim != 4 or len(x) != n_labels or not len(x):
        hint = {
            2: "; for flattened images use reshape(N, C, H, W)",
            3: "; for grey images use x.unsqueeze(1)",
        }.get(x.ndim, "")
        raise DataError(
            f"{source}: expected images [N, C, H, W] with one label each, "
            f"got images {list(x.shape)} and {n_labels} labels{hint}"
        )
    if x.shape[1] not in (1, 3) or x.shape[2] != x.shape[3]:
        last = x.shape[3] in (1, 3) and x.shape[1] == x.shape[2]
        hint = "; the channels come last: x.permute(0, 3, 1, 2) puts them first" if last else ""
        raise DataError(
            f"{source}: expected square images of 1 or 3 channels, got {list(x.shape[1:])}{hint}"
        )
    if not SIZES[0] <= x.shape[2] <= SIZES[1]:
        raise DataError(
            f"{source}: images of {x.shape[2]} px; jemkit's networks take "
            f"{SIZES[0]} to {SIZES[1]} px. Resize them first"
        )


def _bytes(x: Tensor, source: str) -> Tensor:
    """Pixels in 0..255; any integer type is accepted if its values are in that range."""
    if x.is_complex():
        raise DataError(f"{source}: pixels of type {x.dtype}; expected uint8 or floats in [0, 1]")
    if x.dtype == torch.bool:
        return x.float()
    if x.dtype != torch.uint8:
        wide = x.long()
        if wide.min() < 0 or wide.max() > 255:
            raise DataError(
                f"{source}: {x.dtype} pixels run from {int(wide.min())} to {int(wide.max())}; "
                "expected 0..255, or floats in [0, 1]"
            )
        x = wide.to(torch.uint8)
    if x.max() == 1:
        raise DataError(
            f"{source}: integer pixels run from {int(x.min())} to 1, which is black in 0..255; "
            f"if 1 is white, pass floats: x.float()"
        )
    return x


def _floats(x: Tensor, source: str) -> Tensor:
    """Pixels as float32, all in [0, 1]."""
    x = x.detach().float()
    broken = (~x.isfinite()).flatten(1).any(1)
    if broken.any():
        first = int(broken.nonzero()[0])
        raise DataError(
            f"{source}: {int(broken.sum())} image(s) contain NaN or inf, the first is {first}"
        )
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        hint = ""
        if low >= 0 and high <= 255:
            hint = ": divide them by 255"
        elif low >= -1 and high <= 1:
            hint = ": (x + 1) / 2, if black is -1"
        raise DataError(
            f"{source}: float pixels run from {low:.3g} to {high:.3g}; expected [0, 1]{hint}"
        )
    return x


Stream = Literal["x", "x_adv", "x_pos", "x_neg"]
"""A stream: images that pass through a model in an update."""


class Views(Options):
    """The two augmented views of a batch, and the streams that update batch norm's statistics."""

    augment_x: bool = True  # the classifier's view
    augment_pos: bool = True  # the density's view
    noise_x: float = Field(0.0, ge=0)  # standard deviation in model units
    noise_pos: float = Field(0.0, ge=0)  # the same for the density's view
    pos_share: float = Field(1.0, gt=0, le=1)  # share of the batch that the density uses
    stats_from: tuple[Stream, ...] = ("x", "x_adv")  # streams that update batch norm's statistics
    cutmix: bool = False  # paste a box of another image into the classifier's view


class Mixed(NamedTuple):
    """CutMix (Yun et al. 2019): which row a box of an image comes from, and what is left."""

    partner: Tensor  # [B], rows of the batch
    weight: Tensor  # [B], the share of the image's own pixels


class Batch(NamedTuple):
    """One step's data, in the model's range (Algorithm 1, line 5)."""

    x: Tensor  # [B, C, H, W], the classifier's view
    y: Tensor  # [B]
    x_pos: Tensor  # [P, C, H, W], the density's view of the first P of these images
    index: Tensor  # type: ignore[assignment]  # [B], which training images these are
    step: int = 0
    generated: Tensor | None = None  # [B], bool, which images are generated; None: none are
    mixed: Mixed | None = None


class Loader:
    """Batches without end, drawn on the run's device; its state can be saved.

    Each of several processes takes every `shard.size`-th row of the same batch, and of the random
    numbers for its views: together they process the batch of a single process.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        rng: Generator,
        *,
        views: Views,
        bounds: Bounds,
        augmentation: Augmentation,
        shard: Shard = WHOLE,
    ) -> None:
        self.images, self.rng, self.shard = images, rng, shard
        self.batch_size = min(batch_size, len(images.y))
        self.views, self.bounds, self.augmentation = views, bounds, augmentation
        check_shares(self.batch_size, views, shard)
        self.steps_per_epoch = steps_per_epoch(len(images.y), batch_size)
        self.step = 0
        self.order = torch.empty(0, dtype=torch.int64, device=images.x.device)

    def batch(self) -> Batch:
        """The next batch; a new order is drawn at the start of each epoch."""
        images, index, generated = self._next()
        views = self.views
        n_pos = positives(self.batch_size, views) // self.shard.size
        x = self._view(images, augment=views.augment_x, noise=views.noise_x)
        pos = images.take(slice(n_pos))
        x_pos = self._view(pos, augment=views.augment_pos, noise=views.noise_pos)
        x, mixed = cut_mixed(x, self.rng, self.shard) if views.cutmix else (x, None)
        batch = Batch(x, images.y, x_pos, index, self.step, generated, mixed)
        self.step += 1
        return batch

    def _next(self) -> tuple[Images, Tensor, Tensor | None]:
        """This process's images of the step, their indices, and which of them are generated."""
        at = self._place()
        index = self.order[at * self.batch_size : (at + 1) * self.batch_size][self._rows]
        return self.images.take(index), index, None

    def _place(self) -> int:
        """The step's place in its epoch; at the first one a new order is drawn."""
        at = self.step % self.steps_per_epoch
        if at == 0:
            n = len(self.images.y)
            self.order = torch.randperm(n, generator=self.rng, device=self.images.x.device)
        return at

    def _view(self, images: Images, *, augment: bool, noise: float) -> Tensor:
        x = images.x
        if augment:
            x = augmented(x, self.augmentation, self.rng, self.shard)
        x = self.bounds.from_unit(Images(x, images.y).unit())
        if noise:
            whole = (len(x) * self.shard.size, *x.shape[1:])
            gaussian = torch.randn(whole, generator=self.rng, device=x.device)
            x = x + noise * gaussian[self._rows]
        return x

    @property
    def _rows(self) -> slice:
        return slice(self.shard.rank, None, self.shard.size)

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"step": self.step, "order": self.order, "rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.step = int(state["step"])
        self.order = torch.as_tensor(state["order"]).to(self.images.x.device)
        self.rng.set_state(torch.as_tensor(state["rng"]))


def steps_per_epoch(n_images: int, batch_size: int, *, mixed: bool = False) -> int:
    """Whole batches of n images; in batches mixed with generated images a rest counts as one."""
    size = min(batch_size, n_images)
    return -(-n_images // size) if mixed else n_images // size


def positives(batch_size: int, views: Views) -> int:
    """How many images of a batch the density uses, and so how many chains a step starts."""
    return max(1, round(views.pos_share * batch_size))


def check_shares(batch_size: int, views: Views, shard: Shard) -> None:
    """Reject a batch that cannot be divided evenly among the processes."""
    for what, n in ("images", batch_size), ("images of the density", positives(batch_size, views)):
        if n % shard.size:
            raise ConfigError(
                f"{shard.size} processes cannot divide {n} {what} per step evenly; set "
                f"run.batch_size "
                f"to a multiple of {shard.size}"
            )


def augmented(
    x: Tensor, augmentation: Augmentation, rng: Generator, shard: Shard = WHOLE
) -> Tensor:
    """Reflect-padded crops and flips of [B, C, H, W], as one gather for the batch."""
    n, _, height, width = x.shape
    whole, own = n * shard.size, slice(shard.rank, None, shard.size)
    pad = augmentation.pad
    rows = torch.arange(height, device=x.device).expand(n, -1)
    columns = torch.arange(width, device=x.device).expand(n, -1)
    if pad:
        shift = torch.randint(-pad, pad + 1, (2, whole, 1), generator=rng, device=x.device)[:, own]
        rows, columns = reflected(rows + shift[0], height), reflected(columns + shift[1], width)
    if augmentation.flip:
        mirror = torch.rand((whole, 1), generator=rng, device=x.device)[own] < 0.5
        columns = torch.where(mirror, columns.flip(1), columns)
    if not pad and not augmentation.flip:
        return x
    each = torch.arange(n, device=x.device).view(-1, 1, 1)
    return x.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut_mixed(x: Tensor, rng: Generator, shard: Shard = WHOLE) -> tuple[Tensor, Mixed]:
    """Each of x [B, C, H, W] with a box of the row before it, of a uniformly drawn area."""
    n, _, height, width = x.shape
    share, *centre = torch.rand((3, n * shard.size), generator=rng, device=x.device)[
        :, shard.rank :: shard.size
    ]
    inside = []
    for size, middle in zip((height, width), centre, strict=True):
        half = share.sqrt() * size / 2
        low, high = (middle * size - half).round(), (middle * size + half).round()
        at = torch.arange(size, device=x.device)
        inside.append((at >= low[:, None]) & (at < high[:, None]))
    box = inside[0][:, :, None] & inside[1][:, None, :]
    partner = torch.arange(n, device=x.device).roll(1)
    weight = 1 - box.float().mean((1, 2))
    return torch.where(box[:, None], x[partner], x), Mixed(partner, weight)


def reflected(index: Tensor, size: int) -> Tensor:
    """Indices beyond an edge, mirrored at it without repeating the edge."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


Shape = tuple[int, int, int]
"""[C, H, W] of one image."""


@dataclass(frozen=True)
class Task:
    """What a part must know of the data and of the run."""

    shape: Shape
    n_classes: int
    radius_px: float  # the usual threat model, L-inf, in 1/255
    n_train: int
    total_steps: int
    images: Callable[[Literal["train", "valid"]], Images]  # never the test split
    hash: str  # of the training images
    bounds: Bounds = Bounds()
    augmentation: Augmentation = Augmentation()
    moments: Path | None = None  # a file of the training images' Gaussians, of an exported model
    fill: bool = True  # fill a replay buffer at once; else when it is first read
    lr: Callable[[int], float] = lambda _: 0.1  # the recipe's learning rate at a step
