"""Batch norm by the statistics of all processes' rows, as one process with the whole batch has."""

import torch
from torch import Tensor, nn

from jemkit.runtime import distributed


class SyncBatchNorm(nn.BatchNorm2d):
    """`BatchNorm2d` in one process, with the same state; among several, two all_reduces a pass.

    Every process must hold equally many rows. Twice differentiable, by any backend.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], normalised for each channel."""
        if not self.training or distributed.size() == 1:
            return nn.BatchNorm2d.forward(self, x)
        mean, variance = self._moments(x.float())
        if self.track_running_stats:
            self._learn(mean, variance, x.numel() // x.shape[1] * distributed.size())
        scale = (variance + self.eps).rsqrt() * self.weight
        return (scale[:, None, None] * (x - mean[:, None, None]) + self.bias[:, None, None]).to(
            x.dtype
        )

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of all processes' rows, [C] each.

        The second collective is the price of a variance about the common mean: one about any other
        point loses the digits that it is far away.
        """
        variance, own = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        mean = distributed.average(own)
        return mean, distributed.average(variance + (own - mean).square())

    @torch.no_grad()
    def _learn(self, mean: Tensor, variance: Tensor, n: int) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        momentum = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * n / (n - 1), momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
