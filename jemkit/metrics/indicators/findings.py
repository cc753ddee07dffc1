"""What an indicator says, and when a count is no accident."""

from typing import TypedDict

from torch import Tensor

Z = 3.29
"""Of a one-sided 99.95 % bound: some ten indicators a figure then err in one of 200 at most,
and only where the share stands at its tolerance already."""


class Finding(TypedDict):
    """One indicator of one figure."""

    name: str
    flag: bool
    found: str  # a sentence with its numbers
    means: str  # what a flag would mean
    do: str  # what to do about it


def at_least(count: int, n: int) -> float:
    """The lower bound of a share (Wilson 1927)."""
    if not n or count <= 0:
        return 0.0
    p = count / n
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half: float = Z / (1 + Z * Z / n) * (p * (1 - p) / n + Z * Z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half)


def surely(count: int, n: int, tolerance: float) -> bool:
    """Whether a share is above what honest models show, chance allowed for."""
    return at_least(count, n) > tolerance


def net(more: Tensor, less: Tensor) -> int:
    """How many more images are in the first set than in the second, both [N] bool."""
    return int(more.sum()) - int(less.sum())


def said(count: int, n: int) -> str:
    return f"{count} of {n} images ({count / n:.1%})"
