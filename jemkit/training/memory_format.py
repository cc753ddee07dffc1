"""The memory format of a model's weights: contiguous or channels last."""

import torch
from torch import nn

from jemkit.runtime.precision import Layout


def laid_out(model: nn.Module, choice: Layout, device: torch.device) -> nn.Module:
    """Use channels last if requested. `auto` uses it except with instance norm on a CPU, which
    alone was slower with it in measurements (docs/performance.md)."""
    slower = device.type == "cpu" and any(isinstance(m, nn.InstanceNorm2d) for m in model.modules())
    last = choice == "yes" or (choice == "auto" and not slower)
    return model.to(memory_format=torch.channels_last) if last else model  # type: ignore[call-overload]
