"""Foreign modules as networks: torchvision's, timm's, and any module of one's own."""

import pytest
import torch
from torch import Generator, nn

from jemkit import Adapted, Backbone, Batch, ConfigError, MisfitError, check
from jemkit.density import Buffer
from jemkit.networks import lent
from jemkit.sampling import PYLD
from jemkit_plugins.adapters import Torchvision
from jemkit_plugins.ebjdat import EBJDAT

SHAPE = (3, 32, 32)


def test_a_torchvision_model_becomes_features_of_its_own_width() -> None:
    with lent(Generator().manual_seed(0)):
        network = Torchvision(model="resnet18").build(SHAPE)
    assert network.width == 512
    assert network(torch.zeros(2, *SHAPE)).shape == (2, 512)


def test_a_model_that_torchvision_lacks_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        Torchvision(model="resnet81").build(SHAPE)


def test_grey_images_are_refused_by_a_network_of_three_channels() -> None:
    with pytest.raises(ConfigError, match="3 channels; these have 1"):
        Torchvision(model="resnet18").build((1, 8, 8))


def plain(**settings: object) -> tuple[nn.Module, Backbone]:
    with lent(Generator().manual_seed(0)):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))
    backbone = Backbone.of_module(
        net,
        shape=(1, 8, 8),
        n_classes=3,
        rng=Generator().manual_seed(1),
        buffer=Buffer(capacity=20),
        steps=2,
        **settings,  # type: ignore[arg-type]
    )
    return net, backbone


def test_any_module_of_logits_trains_with_ebjdat_in_a_loop_of_ones_own() -> None:
    net, backbone = plain(radius_px=25.5)
    objective, rng = EBJDAT(), Generator().manual_seed(2)
    x = torch.rand(12, 1, 8, 8, generator=rng) * 2 - 1
    y = torch.arange(12) % 3
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    totals = []
    for _ in range(30):
        batch = Batch(x, y, x_pos=x, index=torch.arange(12))
        draws = objective.draw(backbone, batch, rng)
        optimizer.zero_grad()
        terms = objective.loss(backbone, batch, draws)
        terms.total.backward()
        optimizer.step()
        totals.append(float(terms.total.detach()))
    assert totals[-1] < totals[0] - 0.2


def test_a_sampler_that_needs_a_stem_is_refused_where_there_is_none() -> None:
    _, backbone = plain(sampler=PYLD())
    assert isinstance(backbone.model.network, Adapted)
    with pytest.raises(MisfitError, match="no stem to split off"):
        check(backbone, EBJDAT())
