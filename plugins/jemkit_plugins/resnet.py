"""ResNets for images of 32 px (He et al., CVPR 2016), as adversarial training uses them."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from jemkit import Network, NetworkSpec, Options, Shape, hookimpl
from jemkit.models.norms import Norm, norm_layer

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Number of blocks in each of the four stages, by depth."""


class ResNet(Options):
    """ResNet-18 or -34 with a 3 x 3 stem and no max pooling: `resnet-18`."""

    positional: ClassVar[tuple[str, ...]] = ("depth",)

    depth: Literal[18, 34] = 18
    width: int = Field(64, ge=1)  # channels of the first stage
    strides: tuple[Literal[1, 2], Literal[1, 2], Literal[1, 2], Literal[1, 2]] = (1, 2, 2, 2)
    norm: Norm = "batch"

    def build(self, shape: Shape) -> Network:
        return ResidualNetwork(shape, self)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut; the stride is in the first convolution."""

    def __init__(self, inner: int, outer: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.norm1 = norm_layer(norm, outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm2 = norm_layer(norm, outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            conv = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, norm_layer(norm, outer))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResidualNetwork(Network):
    """A stem, four stages and a mean over positions."""

    def __init__(self, shape: Shape, options: ResNet) -> None:
        super().__init__()
        channels = options.width
        self.first = nn.Conv2d(shape[0], channels, 3, padding=1, bias=False)
        self.norm = norm_layer(options.norm, channels)
        blocks: list[nn.Module] = []
        stages = zip(BLOCKS[options.depth], options.strides, strict=True)
        for stage, (count, stride) in enumerate(stages):
            for i in range(count):
                outer = options.width * 2**stage
                blocks.append(BasicBlock(channels, outer, stride if i == 0 else 1, options.norm))
                channels = outer
        self.blocks = nn.Sequential(*blocks)
        self.width = channels

    def stem(self, x: Tensor) -> Tensor:
        return self.first(x)  # type: ignore[no-any-return]

    def trunk(self, h: Tensor) -> Tensor:
        return self.blocks(F.relu(self.norm(h))).mean(dim=(2, 3))  # type: ignore[no-any-return]


@hookimpl
def jemkit_networks() -> Mapping[str, type[NetworkSpec]]:
    return {"resnet": ResNet}
