"""Every registered part keeps the laws of its kind, and the laws find a part that breaks them."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Generator, Tensor
from toys import BACKBONES, OBJECTIVES, REGISTRY, UPDATERS, tiny

from jemkit import Options, Terms, testing
from jemkit.errors import ConfigError

KINDS = {
    "sampler": testing.check_sampler,
    "start": testing.check_start,
    "density": testing.check_density,
    "energy": testing.check_energy_model,
    "attack": testing.check_attack,
    "evaluator": testing.check_evaluator,
}
REFINED = {"bpda"}  # needs a model that refines its input: test_refined.py
CASES = [(kind, name) for kind in KINDS for name in sorted(set(REGISTRY[kind]) - REFINED)]
ELSEWHERE = {"lpips"}  # needs weights: test_lpips.py
ADAPTERS = {"torchvision", "timm"}  # need a model's name


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_registered_part_keeps_the_laws_of_its_kind(kind: str, name: str) -> None:
    KINDS[kind](REGISTRY[kind][name]())


@pytest.mark.parametrize("name", sorted(set(REGISTRY["distance"]) - ELSEWHERE))
def test_every_registered_distance_keeps_the_laws_of_its_kind(name: str) -> None:
    testing.check_distance(REGISTRY["distance"][name]())


@pytest.mark.parametrize("name", sorted(set(REGISTRY["network"]) - ADAPTERS))
def test_every_registered_network_keeps_the_laws_of_its_kind(name: str) -> None:
    small = {"wrn": {"depth": 10, "width": 1}, "mlp": {"hidden": 16}}.get(name, {})
    testing.check_network(REGISTRY["network"][name](**small))


@pytest.mark.parametrize("norm", ["none", "batch", "instance", "group"])
def test_every_norm_keeps_the_laws_of_a_network(norm: str) -> None:
    testing.check_network(REGISTRY["network"]["wrn"](depth=10, width=1, norm=norm), channels=3)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_registered_backbone_keeps_the_laws_of_its_kind(name: str) -> None:
    testing.check_backbone(tiny("backbone", name))


@pytest.mark.parametrize("name", ["jem", "jempp", "sadajem", "mebm"])
def test_every_backbone_keeps_its_laws_with_a_hundred_classes(name: str) -> None:
    testing.check_backbone(tiny("backbone", name), n_classes=100)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_registered_objective_keeps_the_laws_of_its_kind(name: str) -> None:
    testing.check_objective(tiny("objective", name))


@pytest.mark.parametrize("outer", ["align", "contrastive", "abs", "squared", "hinge"])
@pytest.mark.parametrize("inner", ["joint", "marginal", "ce"])
def test_every_reading_of_ebjdat_keeps_the_laws_of_an_objective(outer: str, inner: str) -> None:
    testing.check_objective(tiny("objective", "ebjdat", outer=outer, inner=inner, pair="density"))


@pytest.mark.parametrize("name", UPDATERS)
def test_every_registered_updater_keeps_the_laws_of_its_kind(name: str) -> None:
    testing.check_updater(tiny("updater", name))


def test_adaptive_sam_keeps_the_laws_of_an_updater() -> None:
    testing.check_updater(tiny("updater", "sam", adaptive=True, rho=2.0))


class Careless(Options):
    """Walks in place, by torch's own generator."""

    needs_stem: ClassVar[bool] = False

    def step(self, energy: Any, x: Tensor, rng: Generator) -> Tensor:
        return x.add_(torch.randn(x.shape))


class Coupled(Options):
    """Moves each row by its neighbours' mean."""

    needs_stem: ClassVar[bool] = False

    def step(self, energy: Any, x: Tensor, rng: Generator) -> Tensor:
        return x - x.mean(dim=0)


class Wasteful(Options):
    """Draws attached images, and leaves a gradient behind."""

    needs_density: ClassVar[bool] = False

    def draw(self, backbone: Any, batch: Any, rng: Generator) -> Tensor:
        scores = backbone.model(batch.x)
        scores.energy.sum().backward(retain_graph=True)
        return batch.x * scores.energy.view(-1, 1, 1, 1)

    def loss(self, backbone: Any, batch: Any, draws: Tensor) -> Terms:
        return Terms.weighted({"E": (1.0, backbone.model(batch.x).energy.mean())})


@pytest.mark.parametrize(
    ("check", "part", "law"),
    [
        (testing.check_sampler, Careless(), "generator"),
        (testing.check_sampler, Coupled(), "each row by itself"),
        (testing.check_objective, Wasteful(), "alone"),
    ],
)
def test_a_part_that_breaks_a_law_is_told_which(check: Any, part: Any, law: str) -> None:
    with pytest.raises(testing.ConformanceError, match=law):
        check(part)


def test_every_kind_of_part_has_laws_or_a_reason_to_have_none() -> None:
    own = {"distance", "network", "backbone", "objective", "updater"}
    apart = {"dataset"}  # files decide: test_datasets.py
    assert set(REGISTRY.shelves) == {*KINDS, *own, *apart}


def test_an_objective_of_no_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to learn"):
        Terms.weighted({})
    with pytest.raises(ValueError, match="nothing to learn"):
        tiny("objective", "ebjdat", w1=0, w2=0, w3=0, w_clean=0)
    with pytest.raises(ValueError, match="nothing to learn"):
        tiny("objective", "jem", w_px=0, w_pyx=0)
