"""WEAT's start (Mirza et al., ECCV 2024): the leading principal components of each class."""

from collections.abc import Mapping
from functools import cached_property

import torch
from pydantic import Field
from torch import Generator, Tensor

from jemkit import Options, Start, StartSpec, Task, hookimpl
from jemkit.sampling.init_dists import LowRankStart
from jemkit.sampling.moments import check_groups


class PCA(Options):
    """Each class's mean plus Gaussian noise along its leading principal components.

    The components are the fewest that hold `variance` of the class. By default the noise is the
    class's own Gaussian in them; WEAT's is `sigma` = 0.005 times the singular values.
    """

    variance: float = Field(0.95, gt=0, le=1)  # share of the variance that the components hold
    sigma: float | None = Field(None, gt=0)  # None: 1 / sqrt(n), n images of the class

    def build(self, task: Task, device: torch.device) -> Start:
        return PCAStart(self, task, device)


class PCAStart:
    """The components are computed from the training images at the first draw."""

    def __init__(self, options: PCA, task: Task, device: torch.device) -> None:
        self.options, self.task, self.device = options, task, device
        if task.fill:
            check_groups(task)

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        return self.gaussians.draw(n, rng, y)

    @cached_property
    def gaussians(self) -> LowRankStart:
        images = self.task.images("train")
        check_groups(self.task)
        x = self.task.bounds.from_unit(images.unit()).flatten(1)
        classes = [x[images.y == k] for k in range(self.task.n_classes)]
        means = torch.stack([rows.mean(0) for rows in classes])
        bases = [components(rows, self.options.variance, self.options.sigma) for rows in classes]
        rank = max(basis.shape[1] for basis in bases)
        basis = x.new_zeros((len(classes), x.shape[1], rank))
        for k, columns in enumerate(bases):
            basis[k, :, : columns.shape[1]] = columns
        spread = torch.zeros_like(means).to(self.device)
        return LowRankStart(means.to(self.device), basis.to(self.device), spread, self.task)


def components(x: Tensor, variance: float, sigma: float | None) -> Tensor:
    """The leading components [D, R] of rows [N, D], each as long as its noise's deviation."""
    _, sizes, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    held = sizes.double().square().cumsum(0)
    rank = 1 + int((held < variance * held[-1] * (1 - 1e-6)).sum())
    scale = len(x) ** -0.5 if sigma is None else sigma
    columns: Tensor = directions[:rank].T * (scale * sizes[:rank])
    return columns


@hookimpl
def jemkit_starts() -> Mapping[str, type[StartSpec]]:
    return {"pca": PCA}
