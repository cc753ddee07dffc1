"""ResNets for images of 32 px (He et al., CVPR 2016), as adversarial training uses them."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from jemkit import WRN, Bounds, MisfitError, Network, NetworkSpec, Options, Shape, hookimpl
from jemkit.models.norms import Norm, norm_layer

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Number of blocks in each of the four stages, by depth."""


class ResNet(Options):
    """ResNet-18 or -34 with a 3 x 3 stem and no max pooling: `resnet-18`."""

    positional: ClassVar[tuple[str, ...]] = ("depth",)

    depth: Literal[18, 34] = 18  # number of layers
    width: int = Field(64, ge=1)  # channels of the first stage
    # the stride of each stage
    strides: tuple[Literal[1, 2], Literal[1, 2], Literal[1, 2], Literal[1, 2]] = (1, 2, 2, 2)
    norm: Norm = "batch"  # the normalisation layers

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


class SwishWRN(WRN):
    """The WideResNet of Gowal et al. (2021) and its successors, with SiLU: `swishwrn-28-10`.

    Convolutions of stride 2 pad right and bottom alone (SAME), shortcuts start from the activated
    input, and convolutions have no biases.
    """

    bn_momentum: float = Field(0.01, gt=0, le=1)  # weight of a new batch in running statistics
    offset: bool = True  # whether the norms of blocks have one
    mean: tuple[float, ...] = ()  # of the training pixels in [0, 1], per channel; (): none
    std: tuple[Annotated[float, Field(gt=0)], ...] = ()  # of the same pixels

    def unused(self) -> dict[str, str]:
        batch = self.norm in ("batch", "sync")
        return {} if batch else dict.fromkeys(("bn_momentum", "offset"), "without batch norm")

    def build(self, shape: Shape) -> Network:
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, shape[0]):
            raise MisfitError(
                f"swishwrn: mean has {len(self.mean)} values and std {len(self.std)}; expected one "
                f"for each of the {shape[0]} channels, or none"
            )
        return SwishWideResNet(shape, self)


class SwishBlock(nn.Module):
    """A pre-activation block; the stride sits on its first convolution."""

    def __init__(self, inner: int, outer: int, stride: int, options: SwishWRN) -> None:
        super().__init__()
        self.norm1, self.norm2 = _block_norm(inner, options), _block_norm(outer, options)
        self.conv1 = _same_convolution(inner, outer, stride)
        self.conv2 = _same_convolution(outer, outer, 1)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inner != outer:
            self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        passed = x if self.shortcut is None else self.shortcut(h)
        return passed + self.conv2(F.silu(self.norm2(self.conv1(h))))  # type: ignore[no-any-return]


class SwishWideResNet(Network):
    """A stem, three stages, a norm and the mean over the image."""

    mean: Tensor
    std: Tensor

    def __init__(self, shape: Shape, options: SwishWRN) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(options, name), device="cpu").view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.normalises = bool(options.mean)
        channels, blocks = 16, list[nn.Module]()
        self.first = nn.Conv2d(shape[0], channels, 3, padding=1, bias=False)
        for stage in range(3):
            for i in range((options.depth - 4) // 6):
                outer, stride = 16 * options.width * 2**stage, 2 if stage and not i else 1
                blocks.append(SwishBlock(channels, outer, stride, options))
                channels = outer
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm_layer(options.norm, channels, options.bn_momentum)
        self.width = channels
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, x: Tensor) -> Tensor:
        if self.normalises:
            x = (Bounds().to_unit(x) - self.mean) / self.std
        return self.first(x)  # type: ignore[no-any-return]

    def trunk(self, h: Tensor) -> Tensor:
        return F.silu(self.norm(self.blocks(h))).mean(dim=(2, 3))


def _same_convolution(inner: int, outer: int, stride: int) -> nn.Module:
    """A 3 x 3 convolution with SAME padding: at stride 2 one row below and one column right."""
    if stride == 1:
        return nn.Conv2d(inner, outer, 3, padding=1, bias=False)
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(inner, outer, 3, stride, bias=False))


def _block_norm(channels: int, options: SwishWRN) -> nn.Module:
    norm = norm_layer(options.norm, channels, options.bn_momentum)
    if not options.offset and isinstance(norm, nn.BatchNorm2d):
        norm.bias.requires_grad_(False)
    return norm


@hookimpl
def jemkit_networks() -> Mapping[str, type[NetworkSpec]]:
    return {"resnet": ResNet, "swishwrn": SwishWRN}
