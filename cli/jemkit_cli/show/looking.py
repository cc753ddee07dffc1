"""What a model says of images, and where their energies lie among those of the test images."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from jemkit.selection import part_of
from jemkit_cli.show.model import ShownModel

BATCH = 250


class View(NamedTuple):
    """What a model says of one image."""

    probabilities: Tensor  # [K], float64, p(y | x)
    energy: float  # E(x)

    @property
    def label(self) -> int:
        """The predicted class."""
        return int(self.probabilities.argmax())


class Image(NamedTuple):
    """An image that somebody chose."""

    x: Tensor  # [1, C, H, W] in [0, 1], on the CPU
    label: int | None  # the true class, if known
    source: str  # in words


class Reference(NamedTuple):
    """E(x) of test images."""

    values: Tensor  # [N], float64
    text: str  # which images

    def below(self, energy: float) -> float:
        """The share of these images with a lower energy; NaN unless all numbers are finite."""
        if not (self.values.isfinite().all() and energy == energy):
            return float("nan")
        return float((self.values < energy).double().mean())


def views(shown: ShownModel, x: Tensor) -> list[View]:
    """The views of images [B, C, H, W] in [0, 1], in eval mode."""
    with shown.working(), torch.no_grad():
        scores = shown.model.scores(x.to(shown.device))
    p = scores.logits.double().softmax(1).cpu()
    return [View(row, e) for row, e in zip(p, scores.energy.double().tolist(), strict=True)]


def image_at(shown: ShownModel, index: int) -> Image | None:
    """One of the test images; None if there is no such image."""
    if shown.test is None or not 0 <= index < len(shown.test.y):
        return None
    one = shown.test.take(slice(index, index + 1))
    return Image(one.unit(), int(one.y[0]), f"test image {index}")


def next_of_class(shown: ShownModel, index: int, label: int | None) -> int:
    """The next test image after `index`, of a class if one is given; from the end to the start."""
    if shown.test is None:
        return index
    y = shown.test.y
    order = [*range(index + 1, len(y)), *range(index + 1)]
    return next((i for i in order if label is None or int(y[i]) == label), index)


def reference_energies(
    shown: ShownModel, most: int, progress: Callable[[str, int, int], None] | None = None
) -> Reference | None:
    """The energies of at most `most` test images, stratified by class."""
    if shown.test is None or most < 1:
        return None
    part = part_of(shown.test, most)
    pieces, n = [], len(part.images.y)
    for at in range(0, n, BATCH):
        x = part.images.take(slice(at, at + BATCH)).unit().to(shown.device)
        with shown.working(), torch.no_grad():
            pieces.append(shown.model.scores(x).energy.double().cpu())
        if progress is not None:
            progress("energies of test images", min(n, at + BATCH), n)
    text = f"{n} test images" if part.text == "all" else f"{part.text}, of the test images"
    return Reference(torch.cat(pieces), text)
