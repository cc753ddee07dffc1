"""The config.json of a run of jemkit 0.1 keeps its meaning, or is refused by the option."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from toys import REGISTRY

from jemkit import resolve
from jemkit.errors import ConfigError

OLD: dict[str, Any] = {
    "use": "ebjdat", "w1": 0.45, "w2": 0.05, "w3": 0.45, "w_clean": None, "adv_steps": 5,
    "radius_px": None, "start_px": None, "step_px": None, "step_size": 0.01, "step": "sign",
    "norm": "Linf", "projection": True, "inner": "joint", "direction": "raise", "outer": "align",
    "margin": 0.0, "pair": "same", "distance": {"use": "none"}, "distance_weight": 1.0,
}  # fmt: skip
"""The options of EB-JDAT as a config.json of 0.1 has them."""
NEW: dict[str, Any] = {
    "use": "ebjdat", "w1": 0.45, "w2": 0.05, "w3": 0.45, "w_clean": None, "adv_steps": 5,
    "radius_px": None, "norm": "Linf", "ascent": {"use": "sign", "step_px": None},
    "inner": "joint", "outer": "align", "distance": {"use": "none"}, "distance_weight": 1.0,
}  # fmt: skip
PROGRAM = {
    "start_px": 4.0, "step_px": 1.0, "projection": False, "direction": "lower", "pair": "density",
    "outer": "contrastive", "distance": {"use": "logits"}, "distance_weight": -1.0,
}  # fmt: skip
"""What the preset `released` was in 0.1."""
RELEASED = {
    "use": "ebjdatreleased", "w1": 0.45, "w2": 0.05, "w3": 0.45, "w_clean": 0.45, "adv_steps": 5,
    "start_px": 4.0, "step_px": 1.0, "climbs": "logit",
}  # fmt: skip
SGLD = {"use": "sgld", "step_size": 0.05, "noise": 0.0, "clip": None}

SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, NEW),
    ({"step_px": 2.0}, {**NEW, "ascent": {"use": "sign", "step_px": 2.0}}),
    ({"step": "normalised"}, {**NEW, "ascent": {"use": "l2", "step_px": None}}),
    ({"step": "normalised", "step_px": 9.0}, {**NEW, "ascent": {"use": "l2", "step_px": 9.0}}),
    ({"step": "gradient", "step_size": 0.05}, {**NEW, "ascent": SGLD}),
    ({"step": "gradient", "step_size": 0.05, "step_px": 3.0}, {**NEW, "ascent": SGLD}),
    ({"radius_px": 4.0, "start_px": 4.0}, {**NEW, "radius_px": 4.0}),
    ({"margin": 0.5}, NEW),
    ({"w2": 0.0, "outer": "hinge"}, {**NEW, "w2": 0.0}),
    (PROGRAM, RELEASED),
    ({**PROGRAM, "inner": "ce", "direction": "raise"}, {**RELEASED, "climbs": "ce"}),
    ({**PROGRAM, "w_clean": 0.3, "adv_steps": 2}, {**RELEASED, "w_clean": 0.3, "adv_steps": 2}),
]
"""What a config says otherwise than by default, and the options that it is now."""


def saved(folder: Path, options: dict[str, Any]) -> Path:
    """The config.json of a run with these options."""
    tables = resolve(REGISTRY).tables
    path = folder / "config.json"
    path.write_text(json.dumps({"recipe": {**tables, "objective": options}, "origins": {}}))
    return path


@pytest.mark.parametrize(("options", "now"), SAME, ids=str)
def test_a_config_of_0_1_means_what_it_meant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], now: dict[str, Any]
) -> None:
    with caplog.at_level(logging.WARNING):
        resolved = resolve(REGISTRY, config=saved(tmp_path, {**OLD, **options}))
    assert resolved.tables["objective"] == now
    assert not caplog.text  # of a run nobody need change anything


LOST = [
    ({"direction": "lower"}, "objective.direction: no such option.*'lower'"),
    ({"projection": False}, "objective.projection: no such option.*False"),
    ({"pair": "density"}, "objective.pair: no such option.*'density'"),
    ({"start_px": 0.0}, r"objective.start_px: no such option.*0\.0"),
    ({"outer": "abs"}, "objective.outer: .*'abs'"),
    ({"outer": "hinge", "margin": 1.0}, "objective.outer: .*'hinge'"),
    ({**PROGRAM, "w2": 0.0, "direction": "lower"}, "objective.direction: no such option"),
    ({**PROGRAM, "distance_weight": 1.0}, "objective.direction: no such option"),
    ({**PROGRAM, "start_px": None}, "objective.direction: no such option"),
]


@pytest.mark.parametrize(("options", "message"), LOST, ids=str)
def test_a_value_that_can_no_longer_be_had_is_refused_with_its_file(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        resolve(REGISTRY, config=saved(tmp_path, {**OLD, **options}))
    assert "config.json" in str(refused.value)


def test_a_setting_goes_on_top_of_an_old_config(tmp_path: Path) -> None:
    path = saved(tmp_path, {**OLD, "step": "gradient"})
    resolved = resolve(REGISTRY, config=path, overrides=["objective.ascent.step_size=0.05"])
    assert resolved.tables["objective"] == {**NEW, "ascent": SGLD}
    path = saved(tmp_path, {**OLD, **PROGRAM})
    resolved = resolve(REGISTRY, config=path, overrides=["objective.step_px=3"])
    assert resolved.tables["objective"] == {**RELEASED, "step_px": 3}


def test_an_old_config_whose_objective_is_replaced_is_not_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {**OLD, "outer": "abs"})
    named = {"objective": {"use": "jem"}}
    assert resolve(REGISTRY, config=path, named=named).tables["objective"]["use"] == "jem"


@pytest.mark.parametrize("objective", ["jem", "ebjdat"])
def test_a_run_of_before_selects_its_best_epoch_as_it_did(tmp_path: Path, objective: str) -> None:
    tables = resolve(REGISTRY, named={"objective": {"use": objective}}).tables
    before = {name: value for name, value in tables["run"].items() if name != "select"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"recipe": {**tables, "run": before}, "origins": {}}))
    assert resolve(REGISTRY, config=path).recipe.run.select == "pgd10"
    part = {"objective": {"use": objective}, "run": {"epochs": 3}}
    path.write_text(json.dumps(part))
    assert resolve(REGISTRY, config=path).recipe.run.select == tables["run"]["select"]


def test_only_the_config_of_a_run_is_translated() -> None:
    for option in ("step=gradient", "direction=lower"):
        with pytest.raises(ConfigError, match="no such option"):
            resolve(REGISTRY, overrides=[f"objective.{option}"])
