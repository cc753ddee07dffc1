"""Figures: measured values with their intervals and protocols."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BeforeValidator, Field, Strict
from torch import Generator, Tensor

from jemkit.attacks.base import nonstandard

Z = 1.959964  # of a two-sided 95 % interval


Number = Annotated[float, Strict()]
Value = Annotated[Number, BeforeValidator(lambda saved: math.nan if saved is None else saved)]


class Figure(NamedTuple):
    """One measured value, with its protocol, and an interval if one is defined."""

    name: str
    value: Value
    low: Number | None
    high: Number | None
    n: Annotated[int, Strict(), Field(ge=0)]
    protocol: dict[str, Any]

    @property
    def key(self) -> str:
        """The identity of a figure in a record: a hash of its name and its protocol.

        Measured entries of the protocol (RESULTS) are not part of it.
        """
        card = canonical(finite(without_results(self.protocol)))
        text = json.dumps([self.name, card], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


RESULTS = frozenset(
    {"seconds", "accuracy_after", "max_delta_px", "std", "mean_distance", "infinity"}
)
"""Entries of a protocol that are measured, not set."""


def without_results(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """A protocol without its measured entries."""
    return {
        key: without_results(value) if isinstance(value, Mapping) else value
        for key, value in protocol.items()
        if key not in RESULTS
    }


def _of_json(value: Any, number: Callable[[float], Any]) -> Any:
    """A tree as JSON, with `number` applied to each float."""
    if isinstance(value, Mapping):
        return {str(key): _of_json(inner, number) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_of_json(inner, number) for inner in value]
    return number(value) if isinstance(value, float) else value


def finite(value: Any) -> Any:
    """A tree as JSON, with None for non-finite numbers."""
    return _of_json(value, lambda number: number if math.isfinite(number) else None)


def canonical(value: Any) -> Any:
    """A tree in which equal numbers are written equally: 8.0 becomes 8."""
    return _of_json(value, lambda number: int(number) if number.is_integer() else number)


def joined(card: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A protocol with more entries; reasons for being non-standard are joined."""
    return {**card, **more, **nonstandard(part.get("why") for part in (card, more))}


def share(name: str, right: int, n: int, protocol: dict[str, Any]) -> Figure:
    """A share with its 95 % interval (Wilson 1927)."""
    return Figure(name, right / n, *wilson(right, n, Z), n, protocol)


def near_chance(accuracy: float, n_classes: int) -> bool:
    """Whether a classifier hardly does better than a guess among its classes.

    That is less than 1.5 / K, and less than a tenth of the way from 1 / K to 1.
    """
    guess = 1 / n_classes
    return accuracy < min(1.5 * guess, guess + 0.1 * (1 - guess))


def wilson(count: int, n: int, z: float) -> tuple[float, float]:
    """The bounds of a share, z standard deviations away."""
    p = count / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def plain(name: str, value: float, n: int, protocol: dict[str, Any]) -> Figure:
    """A number for which no interval is defined."""
    return Figure(name, float(value), None, None, n, protocol)


def paired_difference(
    a: Tensor, b: Tensor, rng: Generator, resamples: int = 10_000
) -> tuple[float, float, float]:
    """Mean of a - b [N] with its 95 % percentile interval of the paired bootstrap (Efron 1979)."""
    gap = a.double() - b.double()
    means = torch.stack(
        [gap[torch.randint(len(gap), (len(gap),), generator=rng)].mean() for _ in range(resamples)]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(gap.mean()), low, high


BINS = 50


def histograms(values: Mapping[str, Tensor], bins: int = BINS) -> dict[str, Any]:
    """`edges`, and under each set's name its share in each bin; `n` and `mean` of every set.

    A set that contains NaN or inf has no histogram, only `n` and `mean`.
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
    """bins + 1 edges over the range of all sets; if all values are equal, a range of 1."""
    whole = torch.cat(sets).double()
    low, high = float(whole.min()), float(whole.max())
    margin = 0.0 if high > low else 0.5
    return torch.linspace(low - margin, high + margin, bins + 1, dtype=torch.float64)


def shares(values: Tensor, edges: Tensor) -> Tensor:
    """The share of the values [N] in each bin (low, high]; every value is in one."""
    index = torch.bucketize(values.double(), edges[1:-1])
    return torch.bincount(index, minlength=len(edges) - 1).double() / len(values)
