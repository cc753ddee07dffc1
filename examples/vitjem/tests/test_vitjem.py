"""The ViT, its energy and its variant keep the laws of their kinds, and do what they claim."""

from importlib.util import find_spec

import pytest
import torch
from jemkit import Buffer, ConfigError, LogSumExp, SmallCNN
from jemkit.testing import CHECKS, check_backbone, toy_batch, toy_model, toy_task

from jemkit_vitjem import LearntTemperature, ViT, ViTJEM

needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")


@needs_timm
def test_the_variant_keeps_the_laws_on_its_own_network() -> None:
    check_backbone(ViTJEM(network=ViT(dim=16, depth=1), buffer=Buffer(capacity=20)))


@needs_timm
def test_the_network_keeps_the_laws_of_its_kind() -> None:
    CHECKS["network"](ViT(dim=16, depth=1))


def test_the_energy_keeps_the_laws_of_its_kind() -> None:
    CHECKS["energy"](LearntTemperature(temperature=2.0))


@needs_timm
@pytest.mark.parametrize(("px", "patch"), [(8, 2), (16, 2), (32, 4)])
def test_patches_grow_with_the_image(px: int, patch: int) -> None:
    network = ViT(dim=16, depth=1).build((3, px, px))
    assert network.module.patch_embed.patch_size == (patch, patch)
    assert network(torch.zeros(2, 3, px, px)).shape == (2, 16)


def test_patches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="patches of 3 px do not divide images"):
        ViT(patch=3).build((1, 8, 8))


def test_at_temperature_1_it_is_jems_energy() -> None:
    task = toy_task()
    jem = toy_model(task, SmallCNN(), LogSumExp())
    tempered = toy_model(task, SmallCNN(), LearntTemperature())
    x = toy_batch(task).x
    for ours, theirs in zip(tempered(x), jem(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_temperature_is_learnt_by_the_energy_and_not_by_the_classifier() -> None:
    task = toy_task()
    model, x = toy_model(task, SmallCNN(), LearntTemperature(temperature=2.0)), toy_batch(task).x
    log_t = model.get_parameter("log_t")
    (slope,) = torch.autograd.grad(model(x).energy.mean(), log_t)
    assert slope != 0
    (none,) = torch.autograd.grad(model(x).logits.sum(), log_t, allow_unused=True)
    assert none is None
