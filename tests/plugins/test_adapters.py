"""Foreign modules as networks: torchvision's, timm's, and any module of one's own."""

import sys
from typing import Any

import pytest
import torch
from torch import Generator, nn

from jemkit import Adapted, Backbone, Batch, ConfigError, MisfitError, check
from jemkit.models.networks import seeded_init
from jemkit.runtime import torchvision_compat
from jemkit.runtime.modes import eval_mode
from jemkit.sampling.density import Buffer
from jemkit.sampling.kernels import PYLD
from jemkit_plugins.adapters import Timm, Torchvision
from jemkit_plugins.ebjdat import EBJDAT

SHAPE = (3, 32, 32)


def test_a_torchvision_model_becomes_features_of_its_own_width() -> None:
    with seeded_init(Generator().manual_seed(0)):
        network = Torchvision(model="resnet18").build(SHAPE)
    assert network.width == 512
    assert network(torch.zeros(2, *SHAPE)).shape == (2, 512)


def test_a_model_that_torchvision_lacks_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        Torchvision(model="resnet81").build(SHAPE)


def test_grey_images_are_refused_by_a_network_of_three_channels() -> None:
    with pytest.raises(ConfigError, match="3 channels; these have 1"):
        Torchvision(model="resnet18").build((1, 8, 8))


FITTING = {  # whose builders want an option, or whose last layer is none of the common kind
    "googlenet": 1024, "vit_b_16": 768, "squeezenet1_1": 512, "regnet_x_400mf": 400,
    "mobilenet_v3_small": 1024, "shufflenet_v2_x0_5": 1024, "swin_t": 768, "vgg11": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n != "vgg11" else pytest.param(n, marks=pytest.mark.slow) for n in FITTING]
)
def test_every_family_gives_features_in_both_modes(name: str) -> None:
    with seeded_init(Generator().manual_seed(0)):
        network = Torchvision(model=name).build(SHAPE)
    assert network.width == FITTING[name]
    x = torch.rand(2, *SHAPE, generator=Generator().manual_seed(1))
    with torch.no_grad():
        assert network(x).shape == (2, network.width)
        with eval_mode(network):
            assert network(x).shape == (2, network.width)


@pytest.mark.parametrize("name", ["inception_v3", "alexnet", "maxvit_t", "vit_h_14"])
def test_a_network_for_larger_images_is_refused_before_a_run(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} does not take images of 3 x 32 x 32: .+ size"):
        Torchvision(model=name).build(SHAPE)


def test_a_look_at_the_features_draws_nothing_and_learns_nothing() -> None:
    rng, other = Generator().manual_seed(0), Generator().manual_seed(0)
    with seeded_init(rng):
        network = Torchvision(model="resnet18").build(SHAPE)
    with seeded_init(other):
        bare = torchvision_compat.torchvision().models.resnet18(weights=None)
    assert torch.equal(rng.get_state(), other.get_state())
    assert network.training
    for name, tensor in bare.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(network.state_dict()[f"module.{name}"], tensor), name


class Pair(nn.Module):
    """A network with an auxiliary head, or of a fixed image size."""

    def __init__(self, kind: str, num_features: int = 8) -> None:
        super().__init__()
        self.layer, self.kind, self.num_features = nn.Linear(12, 8), kind, num_features

    def forward(self, x: torch.Tensor) -> Any:
        assert self.kind != "large", "images of 224 px"
        h = self.layer(x.flatten(1))
        if self.kind == "dict":
            return {"out": h}
        return (h, h) if self.kind == "tuple" and self.training else h


class Zoo:
    """The part of timm that the adapter uses."""

    def __init__(self, kind: str, sized: bool = False, num_features: int = 8) -> None:
        self.kind, self.sized, self.num_features = kind, sized, num_features
        self.options: dict[str, Any] = {}

    def is_model(self, name: str) -> bool:
        return name == "some"

    def list_models(self) -> list[str]:
        return ["some"]

    def create_model(self, name: str, **how: Any) -> nn.Module:
        if not self.sized and "img_size" in how:
            raise TypeError("unexpected keyword argument 'img_size'")
        self.options = how
        return Pair(self.kind, self.num_features)


@pytest.mark.parametrize("kind", ["plain", "tuple", "dict", "large"])
@pytest.mark.parametrize("sized", [False, True])
def test_timms_networks_are_looked_at_likewise(
    kind: str, sized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = Zoo(kind, sized)
    monkeypatch.setitem(sys.modules, "timm", zoo)  # type: ignore[arg-type]
    if kind == "plain":
        assert Timm(model="some").build((3, 2, 2)).width == 8
        assert zoo.options.get("img_size") == (2 if sized else None)
        assert zoo.options["pretrained"] is False
        return
    with pytest.raises(ConfigError, match="timm's some does not take images of 3 x 2 x 2"):
        Timm(model="some").build((3, 2, 2))


def test_a_width_that_timm_tells_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = Zoo("plain", num_features=5)
    monkeypatch.setitem(sys.modules, "timm", zoo)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"it returns \[2, 8\] for 2 images; expected features"):
        Timm(model="some").build((3, 2, 2))


def plain(**settings: object) -> tuple[nn.Module, Backbone]:
    with seeded_init(Generator().manual_seed(0)):
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
    with pytest.raises(MisfitError, match="does not provide its first layer"):
        check(backbone, EBJDAT())
