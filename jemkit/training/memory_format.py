"""How a model's weights lie in memory: as torch has them, or channels last."""

import torch
from torch import nn

from jemkit.runtime.precision import Layout


def laid_out(model: nn.Module, choice: Layout, device: torch.device) -> nn.Module:
    """Channels last where asked for.

    `auto` takes it but with instance norm on a CPU, which alone was slower by it where it was
    measured (docs/performance.md).
    """
    slower = device.type == "cpu" and any(isinstance(m, nn.InstanceNorm2d) for m in model.modules())
    last = choice == "yes" or (choice == "auto" and not slower)
    return model.to(memory_format=torch.channels_last) if last else model  # type: ignore[call-overload]
