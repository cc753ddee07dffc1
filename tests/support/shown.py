"""A small model as `jemkit show` shows it."""

from typing import Any

from toys import backbone_of

from jemkit.attacks.pixel_model import PixelModel
from jemkit.testing.toys import toy_images
from jemkit_cli.show.model import ShownModel


def shown_toy(name: str = "sadajem", **more: Any) -> ShownModel:
    """A backbone that is not trained, with 12 test images of 3 classes."""
    backbone = backbone_of(name)
    model = PixelModel(backbone.model, backbone.bounds, backbone.density_or_none)
    test = toy_images(12, 3, 8, 1, 0)
    return ShownModel(model, (1, 8, 8), 3, radius_px=25.5, test=test, **more)
