"""Plug-ins are found by name; a wrong one is left out with its reason, and no other suffers."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jemkit import Options, hookimpl, installed
from jemkit.config.registry import Plugin, Registry, registry_of
from jemkit.errors import ConfigError, UnknownName


class Still(Options):
    """A sampler that stays where it is."""

    needs_stem: bool = False

    def step(self, energy: Any, x: Any, rng: Any) -> Any:
        return x


class Flat(Options):
    """An energy model's options."""

    def build(self, network: Any, n_classes: int) -> Any:
        raise NotImplementedError


class Samplers:
    @hookimpl
    def jemkit_samplers(self) -> Mapping[str, Any]:
        return {"still": Still}


class Energies:
    @hookimpl
    def jemkit_energy_models(self) -> Mapping[str, Any]:
        return {"flat": Flat}

    @hookimpl
    def jemkit_recipes(self) -> Mapping[str, Any]:
        return {"preset/flat": {"run": {"epochs": 1}}}


class Raises:
    @hookimpl
    def jemkit_samplers(self) -> Mapping[str, Any]:
        raise RuntimeError("no licence")


class Leaves:
    @hookimpl
    def jemkit_samplers(self) -> Mapping[str, Any]:
        raise SystemExit(0)


class Misspelt:
    @hookimpl
    def jemkit_sampler(self) -> Mapping[str, Any]:
        return {}


class Unmarked:
    def jemkit_samplers(self) -> Mapping[str, Any]:
        return {"still": Still}


class Unlike:
    """Offers a part that is no sampler, after one that is."""

    @hookimpl
    def jemkit_samplers(self) -> Mapping[str, Any]:
        return {"good": Still, "bad": Flat}


class AnInstance:
    @hookimpl
    def jemkit_samplers(self) -> Mapping[str, Any]:
        return {"still": Still()}


class AList:
    @hookimpl
    def jemkit_samplers(self) -> Any:
        return [Still]


class ALoudName:
    @hookimpl
    def jemkit_samplers(self) -> Mapping[str, Any]:
        return {"Still-Life": Still}


class WithoutOptions:
    """A sampler that is no Options."""

    class Part:
        needs_stem = False

        def step(self, energy: Any, x: Any, rng: Any) -> Any:
            return x

    @hookimpl
    def jemkit_samplers(self) -> Mapping[str, Any]:
        return {"bare": self.Part}


GOOD = [Plugin("a", Samplers(), "alpha", "1.0"), Plugin("b", Energies(), "beta", "2.0")]
WRONG = {
    Raises: "RuntimeError: no licence",
    Leaves: "SystemExit: 0",
    Misspelt: "jemkit_sampler is not a hook of jemkit (did you mean 'jemkit_samplers'?)",
    Unmarked: "jemkit_samplers is not marked as a hook; write @hookimpl above it",
    Unlike: "the sampler 'bad' (Flat) lacks step, needs_stem",
    AnInstance: "expected a class",
    AList: "expected a mapping of names to classes",
    ALoudName: "the sampler name 'Still-Life' is not one lower-case word",
    WithoutOptions: "lacks options",
}


def contents(registry: Registry) -> Any:
    offers = {kind: shelf.offers() for kind, shelf in registry.shelves.items()}
    return offers, dict(registry.recipes), registry.faults


@given(st.permutations([*GOOD, *(Plugin(kind.__name__, kind()) for kind in WRONG)]))
def test_plug_ins_in_any_order_give_the_same_registry(plugins: list[Plugin]) -> None:
    ordered = registry_of(sorted(plugins, key=lambda p: p.name))
    assert contents(registry_of(plugins)) == contents(ordered)


def test_each_kind_has_a_shelf_of_its_own() -> None:
    registry = registry_of(GOOD)
    assert list(registry["sampler"]) == ["still"]
    assert list(registry["energy"]) == ["flat"]
    assert registry["sampler"]["still"] is Still
    assert registry["sampler"].name_of(Still) == "still"
    assert registry["sampler"].offers()[0].distribution == "alpha"
    assert registry.faults == []


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_a_wrong_plug_in_is_left_out_whole_with_its_reason(kind: type[Any]) -> None:
    registry = registry_of([*GOOD, Plugin("wrong", kind(), "wrongdist", "0.3")])
    (fault,) = registry.faults
    assert (fault.plugin, fault.distribution, fault.version) == ("wrong", "wrongdist", "0.3")
    assert WRONG[kind] in fault.reason
    assert list(registry["sampler"]) == ["still"]


def test_two_plug_ins_with_one_name_are_an_error_that_names_both() -> None:
    with pytest.raises(ConfigError, match=r"'still'.* of alpha and .* of gamma.*--no-plugins"):
        registry_of([*GOOD, Plugin("c", Samplers(), "gamma", "1.0")])


def test_two_plug_ins_with_one_recipe_are_an_error_that_names_both() -> None:
    class Again:
        @hookimpl
        def jemkit_recipes(self) -> Mapping[str, Any]:
            return {"preset/flat": {}}

    with pytest.raises(ConfigError, match=r"'preset/flat'.* of beta and .* of gamma"):
        registry_of([*GOOD, Plugin("c", Again(), "gamma", "1.0")])


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    registry = registry_of(GOOD)
    with pytest.raises(UnknownName, match=r"no sampler 'stil' \(did you mean 'still'\?\)"):
        registry["sampler"]["stil"]
    with pytest.raises(UnknownName, match="There are: still"):
        registry["sampler"]["xyzzy"]
    with pytest.raises(LookupError):
        registry["sampler"].name_of(Flat)


def test_the_built_in_plug_ins_are_all_well() -> None:
    registry = installed(third_party=False)
    assert registry.faults == []
    assert set(registry["backbone"]) == {"classifier", "dat", "jem", "jempp", "mebm", "sadajem"}
    assert set(registry["objective"]) >= {"ce", "ebjdat", "jem", "pgdat", "trades"}
    assert all(offer.distribution == "jemkit" for offer in registry["backbone"].offers())


def test_a_registry_is_a_value_that_no_other_changes() -> None:
    first, second = registry_of(GOOD), registry_of(GOOD[:1])
    assert list(first["energy"]) == ["flat"]
    assert list(second["energy"]) == []
