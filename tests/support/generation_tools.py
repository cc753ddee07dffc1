"""A model with a density, images, and its samples judged in features of four numbers."""

from typing import Any

import torch
from torch import Tensor, nn
from toys import gen

from jemkit import PixelModel
from jemkit.attacks.base import Threat
from jemkit.data import Images
from jemkit.metrics.evaluator import Context, measure
from jemkit.metrics.figures import Figure
from jemkit.testing import toy_model, toy_task
from jemkit.testing.toys import toy_backbone
from jemkit_plugins.generation import Generation
from jemkit_plugins.generation.features import (
    of_module,
)

TASK = toy_task(n_train=40)
CPU = torch.device("cpu")


def images(split: str) -> Images:
    return TASK.images("train" if split == "train" else "valid")


def subject(seed: int = 0) -> PixelModel:
    built = toy_backbone(TASK, toy_model(TASK, seed=seed))
    return PixelModel(built.model, TASK.bounds, built.density)


def context(**settings: Any) -> Context:
    given = {"images": images, "card": {"split": "test", "standard": True}, "batch_size": 30}
    return Context(gen(), Threat("Linf", 8.0), **{**given, **settings})


def judged(
    ctx: Context | None = None, model: PixelModel | None = None, **options: Any
) -> dict[str, Figure]:
    evaluator = Generation(**{"n": 40, "steps": 1, "features": PIXELS, **options})
    figures = measure(model or subject(), images("test"), [evaluator], ctx or context())
    return {figure.name: figure for figure in figures}


def mean_pixels(pixels: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(pixels, 4).flatten(1)


class MeanPixels(nn.Module):
    """Four numbers an image."""

    def forward(self, pixels: Tensor) -> Tensor:
        return mean_pixels(pixels)


PIXELS = of_module(MeanPixels(), "pixels")
