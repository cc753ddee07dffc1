"""The authors' networks, by the names that their checkpoints have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from strategies import uniform
from torch import Tensor, nn
from toys import gen

from jemkit.models.networks import seeded_init


def normed(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        layer: nn.Module = nn.BatchNorm2d(channels, momentum=0.9)
        layer.running_mean.uniform_(-0.5, 0.5)
        layer.running_var.uniform_(0.5, 2.0)
    elif norm == "instance":
        layer = nn.InstanceNorm2d(channels, affine=True)
    else:
        return nn.Identity()
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.uniform_(layer.bias, -0.5, 0.5)
    return layer


class Unit(nn.Module):
    """Two 3 x 3 convolutions after norm and LeakyReLU 0.2; the second one and a 1 x 1 stride."""

    def __init__(self, inner: int, outer: int, stride: int, norm: str) -> None:
        super().__init__()
        self.bn1, self.bn2 = normed(norm, inner), normed(norm, outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, stride=stride, padding=1)
        changes = inner != outer or stride > 1
        self.shortcut = nn.Sequential(
            *([nn.Conv2d(inner, outer, 1, stride=stride)] if changes else [])
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.bn1(x), 0.2))
        return self.conv2(F.leaky_relu(self.bn2(h), 0.2)) + self.shortcut(x)


class Trunk(nn.Module):
    """A WideResNet of depth 6 n + 4 by the authors' names."""

    def __init__(
        self, n: int = 1, width: int = 1, norm: str = "batch", channels: int = 3, stages: int = 3,
        linear: int = 0, yopo: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = [16, *(16 * width * 2**s for s in range(stages))]
        self.stages = stages
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        for s in range(stages):
            units = [
                Unit(
                    sizes[s] if i == 0 else sizes[s + 1],
                    sizes[s + 1],
                    2 if s and not i else 1,
                    norm,
                )
                for i in range(n)
            ]
            self.add_module(f"layer{s + 1}", nn.Sequential(*units))
        self.bn1 = normed(norm, sizes[-1])
        if linear:
            self.linear = nn.Linear(sizes[-1], linear)
        if yopo:  # JEM++'s program registers its layers twice
            self.layer_one = self.conv1
            layers = [self.get_submodule(f"layer{s + 1}") for s in range(stages)]
            self.other_layers = nn.ModuleList([*layers, self.bn1])
        self.last_dim = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        for s in range(self.stages):
            h = self.get_submodule(f"layer{s + 1}")(h)
        h = F.leaky_relu(self.bn1(h), 0.2)
        return F.avg_pool2d(h, min(8, h.shape[-1])).flatten(1)


class Authors(nn.Module):
    """The trunk with its two heads, of which a JEM reads one and M-EBM both."""

    def __init__(self, classes: int = 10, **trunk: Any) -> None:
        super().__init__()
        self.f = Trunk(**trunk)
        self.energy_output = nn.Linear(self.f.last_dim, 1)
        self.class_output = nn.Linear(self.f.last_dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.class_output(self.f(x))


class Plain(Trunk):
    """The trunk as a classifier of its own."""

    def __init__(self, classes: int = 10, **trunk: Any) -> None:
        super().__init__(linear=classes, **trunk)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(super().forward(x))


def made(kind: Callable[..., nn.Module] = Authors, seed: int = 0, **options: Any) -> nn.Module:
    with seeded_init(gen(seed)):
        return kind(**options).eval()


def buffer(seed: int = 1) -> Tensor:
    return uniform(seed, 5, 3, 32, 32)


def saved(path: Path, module: nn.Module, **how: Any) -> Path:
    """As the authors' programs save: the model and its replay buffer."""
    torch.save({"model_state_dict": module.state_dict(), "replay_buffer": buffer()}, path, **how)
    return path
