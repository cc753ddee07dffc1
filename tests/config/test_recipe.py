"""A recipe is its layers: the later wins, each value has an origin, and no mistake passes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jemkit import hookimpl, installed, resolve
from jemkit.config.layers import flat, leading_comment
from jemkit.config.recipe import Resolved, about_preset, build, complete, schema
from jemkit.config.registry import Plugin, Registry, registry_of
from jemkit.errors import ConfigError, DataError, UnknownName
from jemkit.models.networks import WRN, SmallCNN

INSTALLED = installed(third_party=False)


class Layers:
    """A layer of each kind, all of which set the same options."""

    LOW_TO_HIGH = ("data/digits", "backbone/jem", "objective/jem", "preset/test")

    @hookimpl
    def jemkit_recipes(self) -> dict[str, Any]:
        tables = {}
        for at, key in enumerate(self.LOW_TO_HIGH):
            names = ["theta_steps", "keep", "epochs", "batch_size"][at:]
            tables[key] = {"run": dict.fromkeys(names, 10 + at)}
        return tables


def layered() -> Registry:
    """The built-in parts with these layers alone."""
    bare = registry_of([Plugin("layers", Layers())])
    return Registry(INSTALLED.shelves, bare.recipes)


def run_of(resolved: Resolved) -> dict[str, Any]:
    return resolved.recipe.run.model_dump()


class TestPrecedence:
    def test_every_layer_wins_over_those_below_it(self, tmp_path: Path) -> None:
        config = tmp_path / "mine.toml"
        config.write_text("[run]\nseed = 14\nmax_train = 14\neval_images = 14\n")
        resolved = resolve(
            layered(),
            preset="test",
            config=config,
            overrides=["run.max_train=15", "run.eval_images=15"],
            named={
                "backbone": {"use": "jem"},
                "objective": {"use": "jem"},
                "run": {"eval_images": 16},
            },
        )
        run = run_of(resolved)
        wanted = {"theta_steps": 10, "keep": 11, "epochs": 12, "batch_size": 13}
        assert wanted.items() <= run.items()
        assert (run["seed"], run["max_train"], run["eval_images"]) == (14, 15, 16)
        origins = {key: resolved.origins[f"run.{key}"] for key in (*wanted, "ema_decay")}
        assert origins == dict(zip(wanted, Layers.LOW_TO_HIGH, strict=True)) | {
            "ema_decay": "default"
        }
        assert resolved.origins["run.seed"] == str(config)
        assert resolved.origins["run.max_train"] == "--set run.max_train=15"
        assert resolved.origins["run.eval_images"] == "option"
        assert resolved.origins["backbone.use"] == "option"
        assert resolved.origins["data.use"] == "default"

    def test_layers_of_parts_that_are_not_chosen_do_nothing(self) -> None:
        resolved = resolve(layered(), named={"backbone": {"use": "sadajem"}})
        assert resolved.recipe.run.keep == 10
        assert resolved.origins["run.keep"] == "data/digits"

    @given(st.permutations(["backbone.network.use=smallcnn", "backbone.network.channels=3"]))
    def test_a_part_is_chosen_before_its_options_are_set(self, overrides: list[str]) -> None:
        network = resolve(INSTALLED, overrides=overrides).recipe.backbone
        assert dict(network)["network"] == SmallCNN(channels=3)

    def test_a_named_part_takes_the_options_that_set_gives_it(self) -> None:
        resolved = resolve(
            INSTALLED,
            overrides=["backbone.network.channels=3"],
            named={"backbone": {"network": {"use": "smallcnn"}}},
        )
        assert dict(resolved.recipe.backbone)["network"] == SmallCNN(channels=3)

    def test_every_value_has_an_origin(self) -> None:
        resolved = complete(resolve(INSTALLED), INSTALLED)
        assert set(resolved.origins) == {key for key, _ in flat(resolved.tables)}


class TestParts:
    def test_another_part_begins_from_its_own_defaults(self) -> None:
        config = {"optimizer": {"use": "sgd", "momentum": 0.5, "lr": 3.0}}
        resolved = resolve(INSTALLED, config=config, overrides=["optimizer.use=adam"])
        assert resolved.tables["optimizer"] == {
            "use": "adam",
            "lr": 1e-4,
            "betas": [0.9, 0.999],
            "weight_decay": 0.0,
            "decay_norms": True,
        }
        assert resolved.origins["optimizer.lr"] == "default"
        assert resolved.origins["optimizer.use"] == "--set optimizer.use=adam"

    def test_the_same_part_keeps_what_lower_layers_set(self) -> None:
        resolved = resolve(
            INSTALLED,
            config={"objective": {"use": "ebjdat", "w1": 0.2}},
            named={"objective": {"use": "ebjdat"}},
        )
        assert resolved.tables["objective"]["w1"] == 0.2

    def test_a_pattern_spells_a_networks_options(self) -> None:
        resolved = resolve(INSTALLED, named={"backbone": {"network": {"use": "wrn-16-2"}}})
        network = dict(resolved.recipe.backbone)["network"]
        assert isinstance(network, WRN)
        assert (network.depth, network.width) == (16, 2)
        assert resolved.tables["backbone"]["network"]["use"] == "wrn"

    def test_a_pattern_leaves_the_other_options_to_the_backbone(self) -> None:
        named = {"backbone": {"use": "jem", "network": {"use": "wrn-16-2"}}}
        network = dict(resolve(layered(), named=named).recipe.backbone)["network"]
        assert network == WRN(depth=16, width=2, norm="none")

    @pytest.mark.parametrize("name", ["wrn-16", "wrn-16-2-3", "wrn-"])
    def test_a_pattern_that_is_not_whole_is_refused(self, name: str) -> None:
        with pytest.raises(ConfigError, match="the pattern is wrn-DEPTH-WIDTH"):
            resolve(INSTALLED, named={"backbone": {"network": {"use": name}}})

    @pytest.mark.parametrize("backbone", sorted(INSTALLED["backbone"]))
    @pytest.mark.parametrize("objective", sorted(INSTALLED["objective"]))
    def test_a_saved_config_gives_the_same_recipe(
        self, backbone: str, objective: str, tmp_path: Path
    ) -> None:
        named = {"backbone": {"use": backbone}, "objective": {"use": objective}}
        first = complete(resolve(INSTALLED, named=named), INSTALLED)
        saved = tmp_path / "config.json"
        saved.write_text(json.dumps({"recipe": first.tables, "versions": {}}))
        again = complete(resolve(INSTALLED, config=saved), INSTALLED)
        assert again.tables == first.tables
        assert again.recipe == first.recipe
        assert build(first.tables, INSTALLED) == first.recipe

    def test_a_plain_string_needs_no_quotes(self, tmp_path: Path) -> None:
        overrides = ["data.use=cifar10", f"data.dir={tmp_path}", "backbone.network.norm=none"]
        resolved = resolve(INSTALLED, overrides=overrides)
        assert resolved.tables["data"]["dir"] == str(tmp_path)
        assert resolved.tables["backbone"]["network"]["norm"] == "none"

    @given(st.integers(0, 2**31), st.floats(0.01, 0.99), st.booleans())
    def test_set_reads_numbers_truths_and_tables_as_toml(
        self, seed: int, share: float, strict: bool
    ) -> None:
        resolved = resolve(
            INSTALLED,
            overrides=[
                f"run.seed={seed}",
                f"run={{valid_fraction={share!r}, deterministic={str(strict).lower()}}}",
            ],
        )
        run = resolved.recipe.run
        assert (run.seed, run.valid_fraction, run.deterministic) == (seed, share, strict)


class TestMistakes:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            (
                "backbone.stps=5",
                r"^backbone.stps: no such option \(did you mean 'steps'\?\).*"
                r"got 5 \(from --set backbone.stps=5\)$",
            ),
            ("backbone.network.chanels=5", r"backbone.network.chanels: .*'channels'"),
            ("backbone.buffer.capacty=5", r"backbone.buffer.capacty: .*'capacity'"),
            ("optimizer.momentm=0", r"optimizer.momentm: .*'momentum'"),
            ("run.epoch=5", r"run.epoch: .*'epochs'"),
            ("run.epochs=many", r"run.epochs: .*integer.*'many' \(from --set run.epochs=many\)"),
            ("run.epochs=0", r"run.epochs: .*greater than or equal to 1; got 0"),
            ("optimizer.lr=nan", r"optimizer.lr: .*finite"),
            ("objective.outer=algin", r"objective.outer: .*'align'"),
            ("objective.distance=l2", r"choose one by objective.distance.use"),
            ("updater.rho=fast", r"updater.rho: .*number"),
            ("data.use=folder", r"data.dir: is required: --data-dir DIR"),
            ("optimizer.learning_rate=1", r"did you mean 'lr'\?"),
            (
                "backbone.sampler.use=sgdl",
                r"no sampler 'sgdl' \(did you mean 'sgld'\?\).*from --set",
            ),
            ("backbone.use=nan", r"no backbone 'nan'.*from --set"),
            ("data.use=[3]", r"no dataset '\[3\]'.*from --set"),
            ("optimizer.use=adm", r"no optimizer 'adm' \(did you mean 'adam'\?\)"),
            ("objective={w1=0, w2=0, w3=0, w_clean=0}", r"objective: .*nothing to learn"),
            ("rnu.epochs=1", r"--set rnu.epochs=1: unknown table \[rnu\] \(did you mean 'run'\?\)"),
            ("run=5", r"expected a table \[run\]"),
            ("run.epochs", r"expected KEY=VALUE"),
            ("=5", r"expected KEY=VALUE"),
            ("run..epochs=5", r"is not KEY=VALUE"),
            ("run.epochs=true", r"run.epochs: Input should be a number, not true or false"),
            ("schedule.at=[true]", r"schedule.at: Input should be a number, not true or false"),
            ("optimizer.lr=false", r"optimizer.lr: Input should be a number, not true or false"),
            (f"run.seed={2**63}", r"run.seed: Input should be less than 9,223,372,036,854,775,808"),
            (f"run.epochs={-(2**63)}", r"run.epochs: Input should be less than 9,223,372,036,8"),
            (f"run.epochs='{2**63}'", r"run.epochs: Input should be less than 9,223,372,036,8"),
            (f"run.epochs='{'9' * 5000}'", r"run.epochs: Input should be less than"),
            (f"run.epochs={'9' * 5000}", r"is not KEY=VALUE"),
            ("run.epochs=1e300", r"run.epochs: "),
            ("run.threads=1000000", r"run.threads: .*less than or equal to 4096"),
            (f"run.seed={'[' * 60}{']' * 60}", r"more than 40 tables or lists"),
            (f"run.seed={'[' * 9000}{']' * 9000}", r"is not KEY=VALUE"),
        ],
        ids=lambda text: text[:40],
    )
    def test_a_mistake_names_its_key_its_origin_and_what_was_wanted(
        self, override: str, message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            resolve(INSTALLED, overrides=[override])

    @pytest.mark.parametrize("name", ["a.toml", "a.json"])
    @pytest.mark.parametrize("depth", [41, 900, 100_000])
    def test_tables_too_deep_for_a_recipe_are_refused(
        self, name: str, depth: int, tmp_path: Path
    ) -> None:
        deep = "[" * depth + "]" * depth
        text = f"[run]\nseed = {deep}" if name == "a.toml" else f'{{"run": {{"seed": {deep}}}}}'
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="cannot be read as a recipe"):
            resolve(INSTALLED, config=tmp_path / name)

    @pytest.mark.parametrize("beside", ["run", "data", "optimizer", "sentinel"])
    def test_a_table_beside_the_recipe_is_refused_and_not_left_unread(
        self, beside: str, tmp_path: Path
    ) -> None:
        tables = {"recipe": {"run": {"epochs": 3}}, beside: {"use": "digits"}}
        (tmp_path / "a.json").write_text(json.dumps(tables))
        with pytest.raises(DataError, match=rf"\[{beside}\] is beside the table `recipe`"):
            resolve(INSTALLED, config=tmp_path / "a.json")
        tables = {"recipe": {"run": {"epochs": 3}}, "data": {"classes": ["a"]}, "git": None}
        (tmp_path / "a.json").write_text(json.dumps(tables))
        assert resolve(INSTALLED, config=tmp_path / "a.json").recipe.run.epochs == 3

    def test_every_mistake_has_a_line(self) -> None:
        with pytest.raises(ConfigError) as caught:
            resolve(INSTALLED, overrides=["run.epochs=0", "run.sed=1", "optimizer.lr=-1"])
        assert len(str(caught.value).splitlines()) == 3

    def test_an_unknown_part_or_preset_is_a_lookup_error_with_the_nearest_name(self) -> None:
        with pytest.raises(UnknownName, match=r"no backbone 'sadajm' \(did you mean 'sadajem'"):
            resolve(INSTALLED, named={"backbone": {"use": "sadajm"}})
        with pytest.raises(ConfigError, match=r"no preset 'papr' \(did you mean 'paper'"):
            resolve(INSTALLED, preset="papr")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.toml", "run = [", "cannot be read as a recipe"),
            ("a.json", "{", "cannot be read as a recipe"),
            ("a.json", "[]", "contains no table"),
        ],
    )
    def test_a_file_that_is_no_recipe_is_named(
        self, name: str, content: str, message: str, tmp_path: Path
    ) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=f"{name}.*{message}"):
            resolve(INSTALLED, config=tmp_path / name)

    def test_a_recipe_whose_table_is_none_is_a_mistake_in_it(self, tmp_path: Path) -> None:
        (tmp_path / "a.toml").write_text("data = 'digits'")
        with pytest.raises(ConfigError, match=r"a.toml.*expected a table \[data\]"):
            resolve(INSTALLED, config=tmp_path / "a.toml")

    def test_a_file_that_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"none.toml is missing"):
            resolve(INSTALLED, config=tmp_path / "none.toml")


class TestShipped:
    PRESETS = sorted(k for k in INSTALLED.recipes if k.startswith("preset/"))

    @pytest.mark.parametrize("key", PRESETS)
    def test_every_preset_resolves_and_says_what_it_reproduces(self, key: str) -> None:
        name = key.removeprefix("preset/")
        assert resolve(INSTALLED, preset=name).recipe.objective is not None
        source = r"nswers to|ublished|released|authors|its paper|ours|stage of|first stage"
        assert re.search(source, about_preset(INSTALLED, name))

    @pytest.mark.parametrize("data", ["digits", "cifar10", "cifar100", "svhn"])
    @pytest.mark.parametrize("backbone", sorted(INSTALLED["backbone"]))
    @pytest.mark.parametrize("objective", sorted(INSTALLED["objective"]))
    def test_every_choice_of_parts_has_a_recipe(
        self, data: str, backbone: str, objective: str
    ) -> None:
        named = {"data": {"use": data}, "backbone": {"use": backbone}}
        assert resolve(INSTALLED, named={**named, "objective": {"use": objective}})

    def test_a_leading_comment_is_one_paragraph(self, tmp_path: Path) -> None:
        path = tmp_path / "a.toml"
        path.write_text("# What it is,\n# and more.\n[run]\n# not this\n")
        assert leading_comment(path) == "What it is, and more."
        assert leading_comment({"run": {}}) == ""

    def test_the_schema_is_json_and_its_defaults_name_their_parts(self) -> None:
        tree = json.loads(json.dumps(schema(INSTALLED), allow_nan=False))
        for kind, shelf in INSTALLED.shelves.items():
            assert set(tree["parts"][kind]) == set(shelf)
        sampler = tree["parts"]["backbone"]["sadajem"]["properties"]["sampler"]
        assert sampler["default"]["use"] == "sgld"


def test_an_option_that_was_removed_is_read_where_it_changes_nothing(tmp_path: Path) -> None:
    """Runs of 0.1.0 name `keep` of their attack; "worst" is what it now always is."""
    tables = resolve(INSTALLED, overrides=["objective.use=pgdat"]).tables
    tables["objective"]["attack"] = {**tables["objective"]["attack"], "keep": "worst"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"recipe": tables}))
    assert resolve(INSTALLED, config=path).recipe == resolve(
        INSTALLED, overrides=["objective.use=pgdat"]
    ).recipe  # fmt: skip
    tables["objective"]["attack"]["keep"] = "first"
    path.write_text(json.dumps({"recipe": tables}))
    with pytest.raises(ConfigError, match="keep"):
        resolve(INSTALLED, config=path)
