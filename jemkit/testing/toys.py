"""Small examples for tests: a task of small random images, a small model, a batch."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Generator, Tensor

from jemkit.backbone import Backbone
from jemkit.data import Augmentation, Batch, Bounds, Images, Task, images_hash
from jemkit.models.energy import EnergyModel, EnergyModelSpec, LogSumExp
from jemkit.models.networks import NetworkSpec, SmallCNN, seeded_init
from jemkit.sampling.density import Buffer, Contrastive, DensitySpec, ReplayBuffer
from jemkit.sampling.init_dists import StartSpec, Uniform
from jemkit.sampling.kernels import SGLD, Sampler


def toy_images(n: int, n_classes: int, size: int, channels: int, seed: int) -> Images:
    """Noise around a pattern of each class, uint8."""
    rng = Generator().manual_seed(seed)
    shape = (channels, size, size)
    y = torch.arange(n) % n_classes
    pattern = torch.rand((n_classes, *shape), generator=rng)
    x = 0.7 * pattern[y] + 0.3 * torch.rand((n, *shape), generator=rng)
    return Images((x * 255).round().to(torch.uint8), y)


def toy_task(
    n_classes: int = 3,
    size: int = 8,
    channels: int = 1,
    n_train: int = 24,
    seed: int = 0,
    bounds: Bounds = Bounds(),
) -> Task:
    """A task of `n_train` images, `size` px a side, that a small network can learn."""
    whole = toy_images(2 * n_train, n_classes, size, channels, seed)
    parts = {"train": whole.take(slice(n_train)), "valid": whole.take(slice(n_train, None))}
    return Task(
        shape=(channels, size, size),
        n_classes=n_classes,
        radius_px=25.5,
        n_train=n_train,
        total_steps=10,
        images=lambda split: parts[split],
        hash=images_hash(parts["train"]),
        bounds=bounds,
        augmentation=Augmentation(pad=1, flip=True),
    )


def toy_model(
    task: Task,
    network: NetworkSpec | None = None,
    energy: EnergyModelSpec | None = None,
    seed: int = 0,
) -> EnergyModel:
    """A small convolutional network with batch norm, unless another is named."""
    network = network or SmallCNN(channels=2, norm="batch")
    with seeded_init(Generator().manual_seed(seed)):
        return (energy or LogSumExp()).build(network.build(task.shape), task.n_classes)


def toy_backbone(
    task: Task,
    model: EnergyModel | None = None,
    density: DensitySpec | None = None,
    *,
    sampler: Sampler | None = None,
    start: StartSpec | None = None,
    buffer: Buffer | None = None,
    steps: int = 2,
    seed: int = 0,
) -> Backbone:
    """A backbone with a density: two steps of SGLD from a buffer of twelve slots."""
    rng = Generator().manual_seed(seed)
    p0 = (start or Uniform()).build(task, rng.device)
    states = ReplayBuffer(buffer or Buffer(capacity=4 * task.n_classes), p0, task.n_classes, rng)
    kernel = sampler or SGLD(step_size=1.0, noise=0.01)
    built = (density or Contrastive()).build(kernel, steps, p0, states, task.bounds)
    model = toy_model(task) if model is None else model
    return Backbone(model, built, bounds=task.bounds, radius_px=task.radius_px)


_ROWS: ContextVar[int] = ContextVar("rows", default=sys.maxsize)


@contextmanager
def at_most(rows: int) -> Iterator[None]:
    """Limit the images of a toy batch, to find the fewest that violate a law."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


def toy_batch(task: Task, n: int = 6, positives: int | None = None) -> Batch:
    """The first n training images, plain in both views."""
    n = min(n, _ROWS.get())
    images = task.images("train").take(slice(n))
    x = task.bounds.from_unit(images.unit())
    return Batch(x, images.y, x[: n if positives is None else positives], torch.arange(n))


def at_box(x: Tensor, bounds: Bounds) -> Tensor:
    """Images like x whose every pixel is at an end of its range: dark, bright and checkered."""
    bright = torch.arange(x[0].numel()).view(x[0].shape) % 2 == 1
    kinds = torch.stack([torch.zeros_like(bright), torch.ones_like(bright), bright])
    chosen = kinds[torch.arange(len(x)) % 3]
    return torch.where(chosen, torch.full_like(x, bounds.high), torch.full_like(x, bounds.low))
