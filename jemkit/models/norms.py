"""Norms, fused with the activation and the convolution that follow."""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from jemkit.runtime import distributed
from jemkit.runtime.fsdp import is_sharded
from jemkit.runtime.microbatch import checkpointed, recomputes

Norm = Literal["none", "batch", "sync", "instance", "group"]
"""With several processes `batch` normalises the rows of each one separately, `sync` all of them
together."""


def norm_layer(norm: Norm, channels: int, momentum: float = 0.1) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels, momentum=momentum)
    if norm == "sync":
        return SyncBatchNorm(channels, momentum=momentum)
    if norm == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if norm == "group":
        return nn.GroupNorm(next(g for g in (8, 4, 2, 1) if channels % g == 0), channels)
    return nn.Identity()


def activated(norm: nn.Module, x: Tensor) -> Tensor:
    """LeakyReLU 0.2 of a normalised x, in place on the norm's output.

    The backward pass needs the norm's input and the activation's output, so this saves a quarter of
    a step's memory.
    """
    if isinstance(norm, nn.BatchNorm2d) and _fixed(norm) and not torch.compiler.is_compiling():
        return _FixedNorm.apply(x, norm)  # type: ignore[no-any-return, no-untyped-call]
    h: Tensor = norm(x)
    return F.leaky_relu(h, 0.2) if h is x else F.leaky_relu_(h, 0.2)


def convolved(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """conv(activated(norm, x)).

    With activation checkpointing an update saves only x, and the backward pass recomputes norm and
    activation: half the memory of a block, for two elementwise operations. The convolution itself
    is not repeated, since torch stops recomputing once it has the tensors that it needs.
    """

    def both(x: Tensor) -> Tensor:
        return conv(activated(norm, x))  # type: ignore[no-any-return]

    if not recomputes() or not conv.weight.requires_grad:
        return both(x)
    return checkpointed(both, x, norm, draws=False)


def _fixed(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm is an affine map per channel: running statistics and frozen weights, as in
    attacks."""
    needs_gradient = norm.training or norm.weight.requires_grad or norm.bias.requires_grad
    return norm.running_var is not None and not needs_gradient and not is_sharded(norm.weight)


class _FixedNorm(torch.autograd.Function):
    """`activated` with running statistics and frozen weights, with a fused backward pass.

    It needs the output alone; torch's would also sum over the batch for gradients of the frozen
    weights.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        h: Tensor = F.leaky_relu_(norm(x), 0.2)
        variance = cast("Tensor", norm.running_var)
        ctx.save_for_backward(h, norm.weight * (variance + norm.eps).rsqrt())
        return h

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        h, scale = ctx.saved_tensors
        below = torch.ops.aten.leaky_relu_backward(slope, h, 0.2, True)
        return below.mul_(scale[:, None, None]), None


class SyncBatchNorm(nn.BatchNorm2d):
    """`BatchNorm2d` in one process, with the same state; two all_reduces per pass with several.

    Every process must have the same number of rows. Twice differentiable, with any backend.
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

        A second collective is needed for the variance about the common mean: a variance about
        another point loses precision.
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
