"""What a part that is replaced leaves behind in a recipe."""

from typing import Any

import pytest

from jemkit import installed, resolve
from jemkit.config.registry import Registry
from jemkit.errors import ConfigError

INSTALLED = installed(third_party=False)


SGD_OF = {"classifier": 5e-4, "dat": 5e-4, "jempp": 4e-4, "mebm": 5e-4, "sadajem": 5e-4}
"""Weight decay of the backbones that are trained by SGD; JEM's Adam has none."""


def optimizer_of(**names: str) -> dict[str, Any]:
    preset = names.pop("preset", None)
    named = {table: {"use": name} for table, name in names.items()}
    options: dict[str, Any] = resolve(INSTALLED, preset=preset, named=named).tables["optimizer"]
    return options


class TestWhatASwapLeavesBehind:
    @pytest.mark.parametrize("data", ["cifar10", "cifar100", "svhn"])
    @pytest.mark.parametrize("objective", sorted(INSTALLED["objective"]))
    def test_weight_decay_is_the_backbones_under_every_objective(
        self, data: str, objective: str
    ) -> None:
        for backbone in INSTALLED["backbone"]:
            options = optimizer_of(data=data, backbone=backbone, objective=objective)
            own = {"ebjdat": 0.01, "dat": 0.001}
            by_sgd = backbone in SGD_OF or objective in own
            rate = own.get(objective, 0.1 if by_sgd else 1e-4)
            wanted = {"use": "sgd" if by_sgd else "adam", "lr": rate}
            assert options.items() >= wanted.items(), backbone
            assert options["weight_decay"] == SGD_OF.get(backbone, 0.0), backbone

    @pytest.mark.parametrize(
        ("backbone", "objective", "wanted"),
        [
            ("classifier", "pgdat", ("sgd", 0.1, 5e-4)),
            ("jem", "jem", ("adam", 1e-3, 0.0)),
            ("jempp", "jem", ("sgd", 0.05, 5e-4)),
            ("mebm", "jem", ("adam", 1e-3, 0.0)),
            ("sadajem", "jem", ("sgd", 0.05, 5e-4)),
            ("jem", "ebjdat", ("sgd", 0.1, 0.0)),
            ("jempp", "ebjdat", ("sgd", 0.1, 5e-4)),
            ("mebm", "ebjdat", ("sgd", 0.01, 5e-4)),
            ("sadajem", "ebjdat", ("sgd", 0.1, 5e-4)),
        ],
    )
    def test_on_digits_every_pair_has_its_own_rate_and_its_backbones_decay(
        self, backbone: str, objective: str, wanted: tuple[str, float, float]
    ) -> None:
        options = optimizer_of(data="digits", backbone=backbone, objective=objective)
        assert (options["use"], options["lr"], options["weight_decay"]) == wanted

    @pytest.mark.parametrize("preset", ["paper", "paper-p", "v3", "released", "released-ce"])
    def test_a_preset_leaves_weight_decay_to_the_backbone(self, preset: str) -> None:
        own = ["sadajem"] if preset.startswith("released") else ["jem", *SGD_OF]
        for backbone in sorted({*own} - {"classifier", "dat"}):
            options = optimizer_of(data="cifar10", backbone=backbone, preset=preset)
            assert (options["use"], options["lr"]) == ("sgd", 0.01)
            assert options["weight_decay"] == SGD_OF.get(backbone, 0.0)

    def test_only_what_a_layer_retains_by_name_outlives_a_swap(self) -> None:
        first = {"optimizer": {"use": "adam", "lr": 3e-4, "weight_decay": 0.125}}
        second = {"optimizer": {"use": "sgd", "retain": ["weight_decay"]}}
        registry = Registry(INSTALLED.shelves, {"backbone/jem": first, "objective/jem": second})
        named = {"backbone": {"use": "jem"}, "objective": {"use": "jem"}}
        resolved = resolve(registry, named=named)
        assert (resolved.tables["optimizer"]["lr"], resolved.recipe.optimizer.weight_decay) == (
            0.1,
            0.125,
        )
        assert resolved.origins["optimizer.weight_decay"] == "backbone/jem"
        assert resolved.origins["optimizer.lr"] == "default"

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["weight_decya"], r"names 'weight_decya', which is not an.*did you mean 'weight_d"),
            ([["lr"]], "expected a list of options"),
            ([1], "expected a list of options"),
            ("lr", "expected a list of options"),
        ],
    )
    def test_what_cannot_be_retained_is_named(self, names: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            resolve(INSTALLED, config={"optimizer": {"use": "adam", "retain": names}})

    def test_a_part_chosen_for_a_while_takes_nothing_of_the_others_with_it(self) -> None:
        config = {"backbone": {"use": "sadajem", "steps": 77}, "data": {"use": "digits"}}
        resolved = resolve(INSTALLED, config=config, named={"backbone": {"use": "jem"}})
        plain = resolve(INSTALLED, named={"backbone": {"use": "jem"}, "data": {"use": "digits"}})
        assert resolved.tables["backbone"] == plain.tables["backbone"]
        assert resolved.tables["backbone"]["network"]["use"] == "smallcnn"

    @pytest.mark.parametrize(
        ("config", "named", "message"),
        [
            ({"backbone": {"use": "sadajem", "steps": 77}}, "backbone", "backbone.steps = 77"),
            ({"updater": {"use": "sam", "rho": 7.0}}, "updater", "updater.rho = 7.0"),
            ({"optimizer": {"use": "sgd", "momentum": 0.7}}, "optimizer", "momentum = 0.7"),
        ],
    )
    def test_what_a_file_says_of_a_part_that_is_replaced_is_named(
        self, config: dict[str, Any], named: str, message: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        other = {"backbone": "jem", "updater": "awp", "optimizer": "adam"}[named]
        resolve(INSTALLED, config=config, named={named: {"use": other}})
        assert "config: dropped, since another part was selected later: " in caplog.text
        assert message in caplog.text

    @pytest.mark.parametrize(
        ("preset", "named"),
        [
            ("released", {"backbone": {"use": "jem"}}),
            ("released-ce", {"backbone": {"use": "classifier"}}),
            ("paper", {"objective": {"use": "trades"}}),
        ],
    )
    def test_half_a_preset_is_refused(self, preset: str, named: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=f"the preset {preset} is of the "):
            resolve(INSTALLED, preset=preset, named=named)

    def test_what_a_preset_says_of_a_network_that_is_replaced_is_named(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        resolve(INSTALLED, preset="released", overrides=["backbone.network.use=smallcnn"])
        assert "preset/released: dropped" in caplog.text
        assert "backbone.network.bn_momentum = 0.9" in caplog.text
