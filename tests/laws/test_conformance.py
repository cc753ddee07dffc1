"""Every registered part keeps the laws of its kind."""

from typing import Any

import pytest
from toys import (
    BACKBONES,
    OBJECTIVES,
    REGISTRY,
    SUITED,
    UPDATERS,
    gen,
    tiny,
    toy_recipe,
    toy_registry,
)

from jemkit import Terms, testing
from jemkit.errors import ConfigError
from jemkit_plugins import aa

KINDS = {
    "sampler": testing.check_sampler,
    "ascent": testing.check_ascent,
    "start": testing.check_start,
    "density": testing.check_density,
    "energy": testing.check_energy_model,
    "attack": testing.check_attack,
    "evaluator": testing.check_evaluator,
}
REFINED = {"bpda", "foldings"}  # need a model of their own: test_purification.py, test_ducat.py
REFINED |= {"foreign"}  # needs a data set: test_dat.py
QUICK: dict[tuple[str, str], dict[str, Any]] = {
    ("attack", "aa"): {"version": "released"},
    ("attack", "square"): {"queries": 50},
    ("attack", "eot"): {"steps": 3, "samples": 2},
    ("evaluator", "energies"): {"n": 20, "steps": 3},
    ("evaluator", "et3"): {"steps": 1},
}
"""Less work than the defaults, where those take seconds."""
CASES = [(kind, name) for kind in KINDS for name in sorted(set(REGISTRY[kind]) - REFINED)]
ELSEWHERE = {"lpips"}  # needs weights: test_lpips.py
ADAPTERS = {"torchvision", "timm"}  # need a model's name


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_registered_part_keeps_the_laws_of_its_kind(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aa, "QUERIES", 50)
    KINDS[kind](REGISTRY[kind][name](**QUICK.get((kind, name), {})))


@pytest.mark.parametrize("name", sorted(set(REGISTRY["distance"]) - ELSEWHERE))
def test_every_registered_distance_keeps_the_laws_of_its_kind(name: str) -> None:
    testing.check_distance(REGISTRY["distance"][name]())


@pytest.mark.parametrize("name", sorted(set(REGISTRY["network"]) - ADAPTERS))
def test_every_registered_network_keeps_the_laws_of_its_kind(name: str) -> None:
    small = {"wrn": {"depth": 10, "width": 1}, "mlp": {"hidden": 16}, "resnet": {"width": 4}}.get(
        name, {}
    )
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
    testing.check_objective(tiny("objective", name), SUITED.get(name, {}).get("energy"))


@pytest.mark.parametrize("outer", ["align", "contrastive", "squared"])
@pytest.mark.parametrize("inner", ["joint", "marginal", "ce"])
def test_every_reading_of_ebjdat_keeps_the_laws_of_an_objective(outer: str, inner: str) -> None:
    testing.check_objective(tiny("objective", "ebjdat", outer=outer, inner=inner))


@pytest.mark.parametrize("name", UPDATERS)
def test_every_registered_updater_keeps_the_laws_of_its_kind(name: str) -> None:
    testing.check_updater(tiny("updater", name))


def test_adaptive_sam_keeps_the_laws_of_an_updater() -> None:
    testing.check_updater(tiny("updater", "sam", adaptive=True, rho=2.0))


def test_every_kind_of_part_has_laws_or_a_reason_to_have_none() -> None:
    own = {"distance", "network", "backbone", "objective", "updater"}
    apart = {"dataset"}  # files decide: test_datasets.py
    apart |= {"tracker"}  # stand-ins for their packages: test_trackers.py
    assert set(REGISTRY.shelves) == {*KINDS, *own, *apart}


def test_an_objective_of_no_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to learn"):
        Terms.weighted({})
    task = testing.toy_task()
    backbone, batch = testing.toy_backbone(task), testing.toy_batch(task)
    weighted = {"ebjdat": ("w1", "w2", "w3", "w_clean"), "jem": ("w_px", "w_pyx")}
    for name, weights in weighted.items():
        objective = tiny("objective", name, **dict.fromkeys(weights, 0))
        draws = objective.draw(backbone, batch, gen())
        with pytest.raises(ConfigError, match="nothing to learn"):
            objective.loss(backbone, batch, draws)
        settings = [f"objective.{weight}=0" for weight in weights]
        with pytest.raises(ConfigError, match=f"objective: every weight of {name} is 0"):
            toy_recipe(toy_registry(), "jem", name, "plain", *settings)
