"""Norms, and what follows one: its activation, and the convolution of that."""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from jemkit.memory import made_anew, recomputes
from jemkit.runtime.sharding import is_shared
from jemkit.runtime.syncnorm import SyncBatchNorm

Norm = Literal["none", "batch", "sync", "instance", "group"]
"""Among several processes `batch` normalises each one's rows apart, `sync` all of them together."""


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
    """LeakyReLU 0.2 of a normalised x, written over what the norm made: a backward pass needs the
    norm's input and the activation's output, so a quarter of a step's memory is saved."""
    if isinstance(norm, nn.BatchNorm2d) and _fixed(norm) and not torch.compiler.is_compiling():
        return _FixedNorm.apply(x, norm)  # type: ignore[no-any-return, no-untyped-call]
    h: Tensor = norm(x)
    return F.leaky_relu(h, 0.2) if h is x else F.leaky_relu_(h, 0.2)


def convolved(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """conv(activated(norm, x)).

    Where memory is short an update keeps x alone, and its way back makes the activation anew: half
    of what a block would keep, for two elementwise passes. The convolution itself is not repeated,
    since torch stops once it has what was not kept.
    """

    def both(x: Tensor) -> Tensor:
        return conv(activated(norm, x))  # type: ignore[no-any-return]

    if not recomputes() or not conv.weight.requires_grad:
        return both(x)
    return made_anew(both, x, norm, draws=False)


def _fixed(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm is one line for each channel, as while an attack runs or a chain in eval."""
    asked = norm.training or norm.weight.requires_grad or norm.bias.requires_grad
    return norm.running_var is not None and not asked and not is_shared(norm.weight)


class _FixedNorm(torch.autograd.Function):
    """`activated` by running statistics and frozen weights: its backward pass needs the output
    alone, and one product where torch's would sum over the batch for weights that ask nothing."""

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
