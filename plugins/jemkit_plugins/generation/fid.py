"""Distances between two sets of images in the features of a network: FID and related measures."""

from collections.abc import Iterable, Iterator
from functools import reduce
from statistics import linear_regression
from typing import NamedTuple

import torch
from torch import Generator, Tensor

ROWS = 1000
"""Number of rows whose distances are in memory at a time."""

FULL_RANK = 2048
"""With fewer images a covariance of Inception's 2,048 features does not have full rank."""


class Spread(NamedTuple):
    """A mean over parts of the data, and the standard deviation over the parts."""

    mean: float
    std: float


class Moments(NamedTuple):
    """Count, mean and scatter of rows of features; the moments of parts can be added."""

    n: int
    mean: Tensor  # [D], float64
    scatter: Tensor  # [D, D], float64: the sum of (f - mean)(f - mean)^T

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """The moments of rows [N, D]."""
        wide = rows.double()
        mean = wide.sum(dim=0) / max(1, len(rows))
        centred = wide - mean
        return cls(len(rows), mean, centred.T @ centred)

    def merged(self, other: "Moments") -> "Moments":
        """The moments of both sets together (Chan, Golub and LeVeque 1979)."""
        n = self.n + other.n
        gap = other.mean - self.mean
        share = other.n / max(1, n)
        mean = self.mean + share * gap
        return Moments(
            n, mean, self.scatter + other.scatter + self.n * share * torch.outer(gap, gap)
        )

    @property
    def covariance(self) -> Tensor:
        """The covariance [D, D], divided by N - 1."""
        if self.n < 2:
            raise ValueError(f"{self.n} row(s) of features have no covariance; expected 2 or more")
        return self.scatter / (self.n - 1)


def moments(batches: Iterable[Tensor]) -> Moments:
    """The moments of all rows of some batches [B, D], one batch at a time in float64."""
    return reduce(Moments.merged, (Moments.of(batch) for batch in batches))


def frechet(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two Gaussians (Dowson and Landau 1982).

    With Inception features it is FID (Heusel et al. 2017). The trace of the root is computed from
    the symmetric S_a^(1/2) S_b S_a^(1/2), which has the same eigenvalues and no imaginary part.
    Negative eigenvalues are rounding errors, since covariances have none.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    gap = (a.mean - b.mean).square().sum()
    return float(gap + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def at_infinity(rows: Tensor, reference: Moments, rng: Generator, *, points: int = 5) -> float:
    """The distance extrapolated to infinitely many rows (Chong and Forsyth 2020).

    Its bias falls with 1 / N: a line through the distances of random subsets of N/2 to N rows is
    read off at 0.
    """
    sizes = torch.linspace(max(2, len(rows) // 2), len(rows), points).long().tolist()
    distances = [_of_rows(_some(rows, size, rng), reference) for size in sizes]
    return linear_regression([1 / size for size in sizes], distances).intercept


def _of_rows(rows: Tensor, reference: Moments) -> float:
    """`frechet` of rows [N, D]; for N below D from an N x N matrix of the same eigenvalues."""
    if len(rows) > rows.shape[1]:
        return frechet(Moments.of(rows), reference)
    wide = rows.double()
    centred = (wide - wide.mean(dim=0)) / (len(rows) - 1) ** 0.5
    cross = torch.linalg.eigvalsh(centred @ reference.covariance @ centred.T)
    gap = (wide.mean(dim=0) - reference.mean).square().sum()
    traces = centred.square().sum() + reference.covariance.trace()
    return float(gap + traces - 2 * cross.clamp(min=0).sqrt().sum())


def mmd2(a: Tensor, b: Tensor) -> float:
    """The unbiased squared MMD of rows [N, D] and [M, D] with KID's kernel (x.y / D + 1)^3."""
    wide_a, wide_b = a.double(), b.double()
    inside = (_kernel_without_self(wide_a), _kernel_without_self(wide_b))
    return float(inside[0] + inside[1] - 2 * _kernel(wide_a, wide_b).mean())


def kernel_distance(
    a: Tensor, b: Tensor, rng: Generator, *, subsets: int = 100, size: int = 1000
) -> Spread:
    """Mean and standard deviation of `mmd2` over random subsets.

    With Inception features it is KID (Binkowski et al. 2018). A subset is at most as large as the
    smaller set.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError(f"a kernel distance needs 2 rows or more of each set, got {size}")
    estimates = [mmd2(*(_some(rows, size, rng) for rows in (a, b))) for _ in range(subsets)]
    return _spread(estimates)


def precision_recall(samples: Tensor, reference: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of rows [N, D] and [M, D].

    Precision: the share of samples in the ball around some reference row whose radius is the
    distance to its k-th nearest neighbour. Recall: the same with the roles exchanged.
    """
    if min(len(samples), len(reference)) <= k:
        raise ValueError(
            f"{k} neighbours need more than {k} rows of each set, got {len(samples)} and "
            f"{len(reference)}"
        )
    return _covered(samples, reference, k), _covered(reference, samples, k)


def inception_score(logits: Tensor, *, splits: int = 10) -> Spread:
    """exp of the mutual information of image and class, over `splits` parts of the rows [N, K]
    in order (Salimans et al. 2016): between 1 and K."""
    n = len(logits)
    if n < splits:
        raise ValueError(f"{n} rows cannot be split into {splits} parts")
    p = logits.double().softmax(dim=1)
    parts = [p[i * n // splits : (i + 1) * n // splits] for i in range(splits)]
    return _spread([float(_information(part).exp()) for part in parts])


def nearest_rows(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Euclidean distances [N, k] from each row of a to its k nearest of b, and their indices."""
    exact = "donot_use_mm_for_euclid_dist"
    flat = a.flatten(1)
    parts = [
        torch.cdist(flat, part.flatten(1), compute_mode=exact) for part in torch.split(b, ROWS)
    ]
    neighbours = torch.cat(parts, dim=1).topk(k, dim=1, largest=False)
    return neighbours.values, neighbours.indices


def _information(p: Tensor) -> Tensor:
    """H(mean p) - mean H(p), the mean KL(p || mean p); also where a class has probability 0."""
    entropies: Tensor = torch.special.entr(p).sum(dim=1)
    marginal: Tensor = torch.special.entr(p.mean(dim=0)).sum()
    return marginal - entropies.mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _kernel_without_self(a: Tensor) -> Tensor:
    kernel = _kernel(a, a)
    return (kernel.sum() - kernel.trace()) / (len(a) * (len(a) - 1))


def _some(rows: Tensor, n: int, rng: Generator) -> Tensor:
    index = torch.randperm(len(rows), generator=rng, device=rng.device)[:n]
    return rows[index.to(rows.device)]


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    """The share of points in the ball of at least one centre."""
    own = _blocks(centres, centres)
    radii = torch.cat([block.kthvalue(k + 1, dim=1).values for block in own])  # itself is first
    inside = [(block <= radii).any(dim=1) for block in _blocks(points, centres)]
    return float(torch.cat(inside).double().mean())


def _blocks(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Squared distances [ROWS, M] of each block of rows to all of b, in float64.

    Distances within rounding error are set to 0, so that equal rows have distance 0.
    """
    wide = b.double()
    size_b = wide.square().sum(dim=1)
    for part in torch.split(a.double(), ROWS):
        scale = part.square().sum(dim=1, keepdim=True) + size_b
        squared = scale - 2 * part @ wide.T
        yield squared.where(squared > 1e-12 * scale, 0.0)


def _spread(values: list[float]) -> Spread:
    estimates = torch.tensor(values, dtype=torch.float64)
    return Spread(float(estimates.mean()), float(estimates.std(correction=0)))
