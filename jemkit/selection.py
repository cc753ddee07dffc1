"""Which of labelled images are looked at where not all of them are: a part drawn by class."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from jemkit.data import Images
from jemkit.splits import shuffled_by_class

Selection = Literal["stratified", "first"]
"""A part in which every class has its share, or the first images, as RobustBench takes them."""


class Part(NamedTuple):
    """Images to look at, and how they were chosen."""

    images: Images
    text: str  # for a figure's protocol


def part_of(images: Images, n: int, how: Selection = "stratified") -> Part:
    """At most n of the images, in their own order; always the same ones."""
    whole = len(images.y)
    if n >= whole:
        return Part(images, "all")
    if how == "first":
        return Part(images.take(torch.arange(n)), f"the first {n} of {whole}")
    index = stratified(images.y, n)
    return Part(images.take(index), f"{n} of {whole}, stratified by class, seed 0")


def stratified(y: Tensor, n: int) -> Tensor:
    """The indices of at most n of the labels [N], each class with its share, ascending."""
    return by_class(y)[:n].sort().values


def by_class(y: Tensor) -> Tensor:
    """A fixed order of all indices in which every beginning holds the classes in proportion."""
    return shuffled_by_class(y.cpu(), int(y.max()) + 1)


def missing(y: Tensor, n_classes: int) -> list[int]:
    """The classes that no label is of."""
    return (torch.bincount(y, minlength=n_classes) == 0).nonzero().flatten().tolist()


def told_missing(y: Tensor, n_classes: int) -> str | None:
    """A sentence where labels leave classes out, else None."""
    lacking = missing(y, n_classes)
    if not lacking:
        return None
    names = ", ".join(map(str, lacking[:10])) + (", ..." if len(lacking) > 10 else "")
    return (
        f"the {len(y)} judged images are of {n_classes - len(lacking)} of {n_classes} classes; "
        f"there are none of class {names}: no figure says anything about these"
    )
