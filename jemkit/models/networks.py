"""Networks: images to features."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Generator, Tensor, nn
from torch.func import functional_call

from jemkit.data import Shape
from jemkit.errors import MisfitError
from jemkit.models.energy import Network
from jemkit.models.norms import Norm, activated, convolved, norm_layer
from jemkit.options import Options
from jemkit.runtime.modes import eval_mode


@runtime_checkable
class NetworkSpec(Protocol):
    """A network's options; a registered part."""

    def build(self, shape: Shape) -> Network:
        """Build the network; its weights are drawn from torch's generator: call it in
        `seeded_init`."""


@contextmanager
def seeded_init(rng: Generator) -> Iterator[None]:
    """Let torch's initialisers, which use the global generator, draw from `rng`; the global
    generator is unchanged."""
    donor = rng
    if rng.device.type != "cpu":
        seed = int(torch.randint(2**62, (1,), generator=rng, device=rng.device))
        donor = Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(donor.get_state())
        yield
        donor.set_state(torch.get_rng_state())


class WideBlock(nn.Module):
    """A pre-activation block; the stride sits on its second convolution."""

    def __init__(self, inner: int, outer: int, stride: int, norm: Norm, momentum: float) -> None:
        super().__init__()
        self.norm1 = norm_layer(norm, inner, momentum)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = norm_layer(norm, outer, momentum)
        self.conv2 = nn.Conv2d(outer, outer, 3, stride=stride, padding=1)
        same = inner == outer and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inner, outer, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        h = convolved(self.conv1, self.norm1, x)
        h = convolved(self.conv2, self.norm2, h)
        return h.add_(self.shortcut(x))


def stages_for(px: int) -> int:
    """A WideResNet's stages: four for images of 64 px and more, else three."""
    return 4 if px >= 64 else 3


class WideResNet(Network):
    """The WideResNet of the JEM family: LeakyReLU 0.2, biases everywhere, 16 channels first."""

    recomputes: ClassVar[bool] = True

    def __init__(self, shape: Shape, depth: int, width: int, norm: Norm, momentum: float) -> None:
        super().__init__()
        stages = stages_for(shape[1])
        channels = [16, *(16 * width * 2**i for i in range(stages))]
        self.first = nn.Conv2d(shape[0], 16, 3, padding=1)
        blocks: list[nn.Module] = []
        for stage in range(stages):
            for i in range((depth - 4) // 6):
                inner = channels[stage] if i == 0 else channels[stage + 1]
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(WideBlock(inner, channels[stage + 1], stride, norm, momentum))
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm_layer(norm, channels[-1], momentum)
        self.width = channels[-1]

    def stem(self, x: Tensor) -> Tensor:
        return self.first(x)  # type: ignore[no-any-return]

    def trunk(self, h: Tensor) -> Tensor:
        return activated(self.norm, self.blocks(h)).mean(dim=(2, 3))


class WRN(Options):
    """WideResNet, `wrn-28-10` for depth 28 and width 10."""

    positional: ClassVar[tuple[str, ...]] = ("depth", "width")

    depth: int = Field(28, ge=10)  # 6 n + 4 layers
    width: int = Field(10, ge=1)  # factor of the channels
    norm: Norm = "batch"  # the normalisation layers
    bn_momentum: float = Field(0.1, gt=0, le=1)  # the released code: 0.9

    @field_validator("depth")
    @classmethod
    def _whole_blocks(cls, depth: int) -> int:
        if (depth - 4) % 6:
            raise ValueError(f"a WideResNet has depth 6 n + 4, such as 10, 16 or 28; got {depth}")
        return depth

    def unused(self) -> dict[str, str]:
        return {} if self.norm in ("batch", "sync") else {"bn_momentum": "without batch norm"}

    def build(self, shape: Shape) -> Network:
        return WideResNet(shape, self.depth, self.width, self.norm, self.bn_momentum)


class SmallConvNet(Network):
    """Three convolutions and a 4 x 4 map; for images of 8 px and for tests."""

    def __init__(self, shape: Shape, channels: int, norm: Norm) -> None:
        super().__init__()
        self.first = nn.Conv2d(shape[0], channels, 3, padding=1)
        self.norm1 = norm_layer(norm, channels)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.norm2 = norm_layer(norm, 2 * channels)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.norm3 = norm_layer(norm, 2 * channels)
        self.width = 2 * channels * 4 * 4

    def stem(self, x: Tensor) -> Tensor:
        return self.first(x)  # type: ignore[no-any-return]

    def trunk(self, h: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.norm1(h), 0.2))
        h = self.conv2(F.leaky_relu(self.norm2(h), 0.2))
        h = F.leaky_relu(self.norm3(h), 0.2)
        if h.shape[-1] % 4 and h.is_cuda and torch.are_deterministic_algorithms_enabled():
            h = matrix_pooled(h, 4)
        elif h.shape[-1] % 4:
            h = F.adaptive_avg_pool2d(h, 4)
        elif h.shape[-1] != 4:  # the same, with a deterministic gradient on a GPU
            h = F.avg_pool2d(h, h.shape[-1] // 4)
        return h.flatten(1)


def matrix_pooled(h: Tensor, side: int) -> Tensor:
    """Adaptive average pooling of a map [B, C, S, S] to `side`, by products with a matrix.

    Their gradient is deterministic on a GPU, where that of torch's operator is not.
    """
    size = h.shape[-1]
    bins = torch.zeros(side, size, dtype=h.dtype, device=h.device)
    for i in range(side):
        first, last = i * size // side, -(-(i + 1) * size // side)
        bins[i, first:last] = 1 / (last - first)
    return bins @ h @ bins.T


class SmallCNN(Options):
    """A small convolutional network: 19,000 parameters for 8 x 8 grey images and ten classes."""

    channels: int = Field(16, ge=1)  # of the first layer
    norm: Norm = "none"  # the normalisation layers

    def build(self, shape: Shape) -> Network:
        return SmallConvNet(shape, self.channels, self.norm)


class Perceptron(Network):
    """Fully connected layers with LeakyReLU 0.2."""

    def __init__(self, shape: Shape, hidden: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(shape[0] * shape[1] * shape[2], hidden)
        self.rest = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.width = hidden

    def stem(self, x: Tensor) -> Tensor:
        return self.first(x.flatten(1))  # type: ignore[no-any-return]

    def trunk(self, h: Tensor) -> Tensor:
        for layer in self.rest:
            h = layer(F.leaky_relu(h, 0.2))
        return F.leaky_relu(h, 0.2)


class MLP(Options):
    """A multi-layer perceptron, `mlp-256-2` for 256 units in each of 2 hidden layers."""

    positional: ClassVar[tuple[str, ...]] = ("hidden", "layers")

    hidden: int = Field(256, ge=1)  # units of each hidden layer
    layers: int = Field(2, ge=1)  # number of hidden layers

    def build(self, shape: Shape) -> Network:
        return Perceptron(shape, self.hidden, self.layers)


class Adapted(Network):
    """Any module from images to a vector, as a network; it has no stem for PYLD."""

    has_stem: ClassVar[bool] = False

    def __init__(self, module: nn.Module, width: int = 0) -> None:  # 0: it gives logits
        super().__init__()
        self.module = module
        self.width = width

    def stem(self, x: Tensor) -> Tensor:
        return x

    def trunk(self, h: Tensor) -> Tensor:
        """The module on images [B, C, H, W], to features [B, D]."""
        return self.module(h)  # type: ignore[no-any-return]


def check_features(network: Network, shape: Shape) -> None:
    """Pass two images of this shape, in train and in eval mode: the result must be features [2,
    width].

    Nothing is computed or drawn: weights and images are on the meta device.
    """
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    x = torch.empty((2, *shape), device="meta")
    for mode in (nullcontext(), eval_mode(network)):
        bare = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        with mode, torch.no_grad(), torch.random.fork_rng(devices=[]):
            features = functional_call(network, bare, (x,))
        came = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if came != [2, network.width]:
            raise MisfitError(
                f"it returns {came} for 2 images; expected features [2, {network.width}]"
            )
