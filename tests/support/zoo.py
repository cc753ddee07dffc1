"""Published CIFAR-10 classifiers with known figures, as modules of [0, 1] images."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jemkit import Images

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


class Normalised(nn.Module):
    """A classifier behind the mean and standard deviation that it was trained with."""

    def __init__(self, module: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.module((x - self.mean) / self.std)


class PaddedBlock(nn.Module):
    """Two convolutions beside an identity that is thinned out and padded with empty channels."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.pad = stride, (c_out - c_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(h + F.pad(short, (0, 0, 0, 0, self.pad, self.pad)))


class ResNet20(nn.Module):
    """The CIFAR ResNet of He et al. (2016) with 20 layers and shortcuts without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        stages = [
            nn.Sequential(PaddedBlock(a, b, s), PaddedBlock(b, b, 1), PaddedBlock(b, b, 1))
            for a, b, s in widths
        ]
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(h))).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


class BiasedBlock(nn.Module):
    """Two convolutions with biases and no batch norm, beside a convolution or the identity."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1)
        self.shortcut = nn.Sequential()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet2b(nn.Module):
    """The small robust network of the verification literature."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Sequential(BiasedBlock(8, 16, 2), BiasedBlock(16, 16, 1))
        self.linear1, self.linear2 = nn.Linear(1024, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer1(F.relu(self.conv1(x)))
        return self.linear2(F.relu(self.linear1(h.flatten(1))))


def resnet20() -> Normalised:
    """91.73 % clean, trained without attacks."""
    state = _saved("resnet20-12fca82f.th")
    network = Normalised(ResNet20(), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    network.module.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    return network.eval()


def resnet2b() -> Normalised:
    """69.25 % clean, trained against L-inf attacks of 2/255."""
    network = Normalised(ResNet2b(), [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616])
    network.module.load_state_dict(_saved("resnet2b.pth"))
    return network.eval()


def cifar10(n: int | None = None) -> Images:
    """The first n test images of CIFAR-10; skips where the published files are absent."""
    if not (SHARED / "cifar10" / "restore.py").exists():
        pytest.skip("no CIFAR-10 in ../shared/data/cifar10")
    pixels, labels = runpy.run_path(str(SHARED / "cifar10" / "restore.py"))["load"]("test_batch")
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(labels).long()
    return Images(x[:n], y[:n])


def _saved(name: str) -> dict[str, Tensor]:
    path = SHARED / "checkpoints" / name
    if not path.exists():
        pytest.skip(f"no {name} in ../shared/data/checkpoints")
    state = torch.load(path, map_location="cpu", weights_only=True)
    return dict(state["state_dict"])
