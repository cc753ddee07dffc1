"""Initial distributions out of distribution: blurred or shuffled images, another data set."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    Dataset, Images, MisfitError, Options, PartOf, Shape, Start, Task,
)  # fmt: skip


class Blurred(Options):
    """Training images under a Gaussian blur."""

    share: float = Field(0.125, gt=0, le=1)  # the blur's deviation, relative to the image's side

    def build(self, task: Task, device: torch.device) -> Start:
        sigma = self.share * task.shape[1]
        return Altered(task, device, lambda x, _: blurred(x, sigma))


class Shuffled(Options):
    """Training images cut into squares, which are rearranged in a random order."""

    squares: int = Field(4, ge=2)  # along each side

    def build(self, task: Task, device: torch.device) -> Start:
        side = task.shape[1]
        if side % self.squares:
            raise MisfitError(
                f"images of {side} px cannot be cut into {self.squares} x {self.squares} squares: "
                f"set backbone.start.squares to a divisor of {side}"
            )
        return Altered(task, device, lambda x, rng: shuffled(x, self.squares, rng))


class Foreign(Options):
    """Training images of another data set."""

    dataset: Annotated[Dataset, PartOf("dataset")]  # whose training images are taken

    def build(self, task: Task, device: torch.device) -> Start:
        return Other(task, device, self.dataset)


class Drawn(ABC):
    """Images drawn at random from a set that is read at the first draw; classes are ignored."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.device = task, device

    @abstractmethod
    def images(self) -> Images:
        """The set."""

    @cached_property
    def pixels(self) -> Tensor:
        """Of the whole set, on the run's device."""
        return self.images().x.to(self.device)

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        index = torch.randint(len(self.pixels), (n,), generator=rng, device=rng.device)
        x = self.pixels[index]
        return self.task.bounds.from_unit(self.altered(Images(x, x).unit(), rng))

    def altered(self, x: Tensor, rng: Generator) -> Tensor:
        """The transformation of images [n, C, H, W] in [0, 1]."""
        return x


class Altered(Drawn):
    """Training images, each changed by a function."""

    def __init__(
        self, task: Task, device: torch.device, by: Callable[[Tensor, Generator], Tensor]
    ) -> None:
        super().__init__(task, device)
        self.by = by

    def images(self) -> Images:
        return self.task.images("train")

    def altered(self, x: Tensor, rng: Generator) -> Tensor:
        return self.by(x, rng)


class Other(Drawn):
    """Images of another data set, which must have the same shape."""

    def __init__(self, task: Task, device: torch.device, dataset: Dataset) -> None:
        super().__init__(task, device)
        self.dataset = dataset

    def images(self) -> Images:
        images = self.dataset.load("train")
        shape: Shape = tuple(images.x.shape[1:])  # type: ignore[assignment]
        if shape != self.task.shape:
            raise MisfitError(
                f"backbone.start.dataset has images of {list(shape)}, and the data set "
                f"{list(self.task.shape)}: name one of that shape; a folder of images is resized "
                f"by backbone.start.dataset.size = {self.task.shape[1]}"
            )
        return images


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Images [n, C, H, W] with a Gaussian blur; edges are padded by their pixels."""
    reach = max(1, round(3 * sigma))
    at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    weight = (-(at**2) / (2 * sigma**2)).exp()
    weight = (weight / weight.sum()).view(1, 1, 1, -1)
    rows = F.pad(x.flatten(0, 1)[:, None], [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(rows, weight), weight.transpose(2, 3)).view_as(x).clamp(0, 1)


def shuffled(x: Tensor, squares: int, rng: Generator) -> Tensor:
    """Images [n, C, H, W] with their squares in an order drawn for each image."""
    size = x.shape[2] // squares
    pieces = F.unfold(x, size, stride=size)  # [n, C size size, squares squares]
    order = torch.rand((len(x), squares**2), generator=rng, device=x.device).argsort(1)
    pieces = pieces.gather(2, order[:, None].expand_as(pieces))
    return F.fold(pieces, x.shape[2:], size, stride=size)
