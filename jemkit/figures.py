"""Figures: measured numbers with their intervals and the protocol that gave them."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

Z = 1.959964
"""Of a two-sided 95 % interval."""


class Figure(NamedTuple):
    """One measured number, with an interval where one is defined, and how it was measured."""

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    protocol: dict[str, Any]

    @property
    def key(self) -> str:
        """What a record knows a figure by: a hash of its name and its whole protocol.

        Left out is what the measurement gave (RESULTS).
        """
        card = canonical(finite(without_results(self.protocol)))
        text = json.dumps([self.name, card], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


RESULTS = frozenset({"seconds", "accuracy_after", "max_delta_px", "std", "mean_distance"})
"""Entries of a protocol that are found and not set."""


def without_results(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """A protocol less what the measurement gave."""
    return {
        key: without_results(value) if isinstance(value, Mapping) else value
        for key, value in protocol.items()
        if key not in RESULTS
    }


def finite(value: Any) -> Any:
    """A tree as JSON has it; a number that is not finite has no JSON and becomes None."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def canonical(value: Any) -> Any:
    """A tree in which equal numbers are written alike: 8.0 is 8."""
    if isinstance(value, Mapping):
        return {key: canonical(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def joined(card: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A protocol with more of it; where both say why a figure is not standard, both reasons."""
    reasons = dict.fromkeys(part["why"] for part in (card, more) if part.get("why"))
    return {**card, **more, **({"why": "; ".join(reasons)} if reasons else {})}


def share(name: str, right: int, n: int, protocol: dict[str, Any]) -> Figure:
    """A share with its 95 % interval (Wilson 1927)."""
    p = right / n
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * (p * (1 - p) / n + Z * Z / (4 * n * n)) ** 0.5
    return Figure(name, p, max(0.0, middle - half), min(1.0, middle + half), n, protocol)


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
