"""Histograms of several sets of numbers in the bins that they share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BINS = 50


def histograms(values: Mapping[str, Tensor], bins: int = BINS) -> dict[str, Any]:
    """`edges`, and under each set's name its share in each bin; `n` and `mean` of every set.

    A set that holds NaN or inf has no histogram: it is in `n` and `mean` alone.
    """
    finite = {name: v for name, v in values.items() if v.isfinite().all()}
    edges = bin_edges(list(finite.values()), bins) if finite else torch.empty(0)
    return {
        "edges": edges.tolist(),
        **{name: shares(v, edges).tolist() for name, v in finite.items()},
        "n": {name: len(v) for name, v in values.items()},
        "mean": {name: float(v.mean()) for name, v in values.items()},
    }


def bin_edges(sets: list[Tensor], bins: int = BINS) -> Tensor:
    """bins + 1 edges over the range of all sets; a single value gets a range of 1."""
    whole = torch.cat(sets).double()
    low, high = float(whole.min()), float(whole.max())
    margin = 0.0 if high > low else 0.5
    return torch.linspace(low - margin, high + margin, bins + 1, dtype=torch.float64)


def shares(values: Tensor, edges: Tensor) -> Tensor:
    """The share of the values [N] in each bin (low, high]; every value is in one."""
    index = torch.bucketize(values.double(), edges[1:-1])
    return torch.bincount(index, minlength=len(edges) - 1).double() / len(values)
