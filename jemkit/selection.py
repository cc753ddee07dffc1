"""Subsets of labelled images for evaluation, stratified by class."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from jemkit.data import Images
from jemkit.splits import shuffled_by_class

Selection = Literal["stratified", "first"]
"""stratified: a subset in proportion to the classes; first: the first images, as in RobustBench."""


class Part(NamedTuple):
    """A subset of images, and how it was selected."""

    images: Images
    text: str  # for a figure's protocol


def part_of(images: Images, n: int, how: Selection = "stratified") -> Part:
    """At most n of the images, in their own order; the same for every call."""
    whole = len(images.y)
    if n >= whole:
        return Part(images, "all")
    if how == "first":
        return Part(images.take(torch.arange(n)), f"the first {n} of {whole}")
    index = stratified(images.y, n)
    return Part(images.take(index), f"{n} of {whole}, stratified by class, seed 0")


def stratified(y: Tensor, n: int) -> Tensor:
    """The indices of at most n of the labels [N], stratified, ascending."""
    return by_class(y)[:n].sort().values


def by_class(y: Tensor) -> Tensor:
    """A fixed order of all indices of which every prefix is stratified by class."""
    return shuffled_by_class(y.cpu(), int(y.max()) + 1)


def missing(y: Tensor, n_classes: int) -> list[int]:
    """The classes without any label."""
    return (torch.bincount(y, minlength=n_classes) == 0).nonzero().flatten().tolist()


def missing_classes_warning(y: Tensor, n_classes: int) -> str | None:
    """A warning if labels lack classes, else None."""
    lacking = missing(y, n_classes)
    if not lacking:
        return None
    names = ", ".join(map(str, lacking[:10])) + (", ..." if len(lacking) > 10 else "")
    return (
        f"the {len(y)} evaluated images are of {n_classes - len(lacking)} of {n_classes} classes; "
        f"there are none of class {names}: the figures say nothing about these"
    )
