"""How a model's weights lie in memory: as torch has them, or channels last."""

import logging
from typing import Literal

import torch
from torch import Tensor, nn

from jemkit.bench.machine import fastest
from jemkit.energy import EnergyModel, ModelEnergy
from jemkit.modes import eval_mode, frozen
from jemkit.runtime.numerics import Layout
from jemkit.sampling import eager_gradient

log = logging.getLogger(__name__)


def laid_out(model: nn.Module, choice: Layout, device: torch.device) -> nn.Module:
    """Channels last where asked for.

    `auto` takes it but with instance norm on a CPU, which alone was slower by it where it was
    measured (docs/performance.md).
    """
    slower = device.type == "cpu" and any(isinstance(m, nn.InstanceNorm2d) for m in model.modules())
    last = choice == "yes" or (choice == "auto" and not slower)
    return _laid(model, torch.channels_last) if last else model


def faster_layout(model: EnergyModel, x: Tensor) -> Literal["yes", "no"]:
    """Whether a chain's gradient of images x [B, C, H, W] takes less time channels last.

    Each layout gets 0.2 s, and its fastest pass counts. Afterwards weights lie as torch has them.
    """
    times = {}
    with frozen(model), eval_mode(model):
        for name, form in (("yes", torch.channels_last), ("no", torch.contiguous_format)):
            _laid(model, form)
            times[name] = fastest(lambda: eager_gradient(ModelEnergy(model), x), x.device)
    last = times["yes"] < times["no"]
    log.info(
        "a gradient takes %.1f ms channels last and %.1f ms else: run.channels_last = %s",
        1e3 * times["yes"], 1e3 * times["no"], "yes" if last else "no",
    )  # fmt: skip
    return "yes" if last else "no"


def _laid(model: nn.Module, form: torch.memory_format) -> nn.Module:
    return model.to(memory_format=form)  # type: ignore[call-overload,no-any-return]
