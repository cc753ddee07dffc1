"""PCA starts: components of a class by hand, their Gaussian, and the classes that are requested."""

from dataclasses import replace
from math import sqrt
from typing import Any

import pytest
import torch
from toys import backbone_of, gen

from jemkit import ConfigError, Images
from jemkit.testing import toy_task
from jemkit_plugins.pca import PCA, components

CPU = torch.device("cpu")
ROWS = torch.tensor([[3.0, 0.0, 1.0], [-3.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, -1.0, 1.0]])
"""Two directions of variance 18 / 4 and 2 / 4 around (0, 0, 1)."""


def test_components_by_hand() -> None:
    first = components(ROWS, 0.9, None)
    assert first.shape == (3, 1)  # 18 of 20
    torch.testing.assert_close(first.abs(), torch.tensor([[sqrt(18 / 4)], [0.0], [0.0]]))
    both = components(ROWS, 0.91, None)
    assert both.shape == (3, 2)
    torch.testing.assert_close(both @ both.T, torch.diag(torch.tensor([4.5, 0.5, 0.0])))


def test_weats_noise_is_a_share_of_the_singular_values() -> None:
    result = components(ROWS, 0.95, 0.005)
    torch.testing.assert_close(result.norm(dim=0), 0.005 * torch.tensor([sqrt(18), sqrt(2)]))


def flat_task(variance: float = 1.0, **options: Any) -> Any:
    """A start of two classes: all of class 0 are black, class 1 varies in its first pixel alone."""
    x = torch.zeros(6, 1, 8, 8)
    x[3:, 0, 0, 0] = torch.tensor([0.4, 0.5, 0.6])
    images = Images(x, torch.tensor([0, 0, 0, 1, 1, 1]))
    task = replace(toy_task(n_classes=2), images=lambda split: images, hash="")
    return PCA(variance=variance, **options).build(task, CPU), task


def test_draws_are_of_the_classs_gaussian_and_of_the_requested_class() -> None:
    start, task = flat_task()
    y = torch.tensor([0, 1]).repeat(2000)
    x = task.bounds.to_unit(start.draw(4000, gen(), y))
    torch.testing.assert_close(x[y == 0], torch.zeros(2000, 1, 8, 8))
    first = x[y == 1][:, 0, 0, 0]
    assert float(first.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(first.std()) == pytest.approx(sqrt(0.02 / 3), rel=0.05)
    assert float(x[y == 1].flatten(1)[:, 1:].abs().max()) < 1e-5


def test_with_all_of_the_variance_the_covariance_is_that_of_the_class() -> None:
    x = toy_task(n_train=60).images("train").unit().flatten(1)
    basis = components(x, 1.0, None)
    torch.testing.assert_close(basis @ basis.T, x.T.cov(correction=0), rtol=1e-3, atol=1e-5)


def test_a_class_without_images_is_refused_when_the_run_is_built() -> None:
    task = toy_task(n_classes=3)
    none = Images(*(part[task.images("train").y != 1] for part in task.images("train")))
    with pytest.raises(ConfigError, match="no training image of class 1"):
        PCA().build(replace(task, images=lambda split: none, fill=True), CPU)


def test_weats_chains_begin_there() -> None:
    backbone = backbone_of("sadajem", start=PCA())
    y = torch.tensor([0, 1, 2])
    x = backbone.density.sample(
        backbone.model, 3, gen(), steps=0, start=backbone.density.start, y=y
    )
    assert x.shape == (3, 1, 8, 8)
