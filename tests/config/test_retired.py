"""Configs of jemkit 0.1 keep their meaning, or are refused with what to write instead."""

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
    ({"w2": 0.0, "outer": "hinge", "pair": "density"}, {**NEW, "w2": 0.0}),
    ({"adv_steps": 0, "direction": "lower", "projection": False}, {**NEW, "adv_steps": 0}),
    (
        {"w2": 0.0, "w3": 0.0, "w_clean": 1.0, "direction": "lower", "start_px": 1.0},
        {**NEW, "w2": 0.0, "w3": 0.0, "w_clean": 1.0},
    ),
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


def toml(folder: Path, options: dict[str, Any]) -> Path:
    """A TOML file of these options; null is left out, as TOML has none."""
    plain = {k: v for k, v in options.items() if isinstance(v, str | float | int)}
    rows = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    rows.append(f'distance.use = "{options["distance"]["use"]}"')
    path = folder / "recipe.toml"
    path.write_text("\n".join(["[objective]", *rows]))
    return path


@pytest.mark.parametrize(("options", "now"), SAME, ids=str)
def test_a_config_of_0_1_means_what_it_meant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], now: dict[str, Any]
) -> None:
    with caplog.at_level(logging.WARNING):
        resolved = resolve(REGISTRY, config=saved(tmp_path, {**OLD, **options}))
    assert resolved.tables["objective"] == now
    assert not caplog.text  # of a run nobody need change anything


@pytest.mark.parametrize(
    ("options", "now"), [(o, n) for o, n in SAME if o.get("w2", 1) and o.get("adv_steps", 1)]
)
def test_a_toml_file_of_0_1_does_too_and_a_warning_says_what_to_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], now: dict[str, Any]
) -> None:
    said = {**OLD, "w_clean": 0.45, **options}
    said = {k: v for k, v in said.items() if k in options or k not in ("margin", "step_size")}
    with caplog.at_level(logging.WARNING):
        resolved = resolve(REGISTRY, config=toml(tmp_path, said))
    assert resolved.tables["objective"] == {**now, "w_clean": said["w_clean"]}
    assert "of jemkit 0.1" in caplog.text


LOST = [
    ({"direction": "lower"}, r"objective.direction = 'lower' was removed.*ebjdatreleased"),
    ({"projection": False}, r"objective.projection = False was removed.*ebjdatreleased"),
    ({"pair": "density"}, r"objective.pair = 'density' was removed.*ebjdatreleased"),
    ({"start_px": 0.0}, r"objective.start_px = 0.0 was removed.*radius_px"),
    ({"outer": "abs"}, r"objective.outer = 'abs' was removed.*set outer = \"squared\""),
    ({"outer": "hinge", "margin": 1.0}, "objective.outer = 'hinge' was removed"),
    ({**PROGRAM, "w2": 0.0, "direction": "lower"}, "objective.direction = 'lower' was removed"),
    ({**PROGRAM, "distance_weight": 1.0}, "objective.direction = 'lower' was removed"),
    ({**PROGRAM, "start_px": None}, "objective.direction = 'lower' was removed"),
]


@pytest.mark.parametrize(("options", "message"), LOST, ids=str)
def test_what_can_no_longer_be_had_is_refused_with_what_to_write(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        resolve(REGISTRY, config=saved(tmp_path, {**OLD, **options}))
    assert "config.json" in str(refused.value)
    assert "This run needs jemkit 0.1" in str(refused.value)


@pytest.mark.parametrize("order", [1, -1])
def test_settings_of_the_command_line_are_read_in_any_order(order: int) -> None:
    settings = ["objective.step=gradient", "objective.step_size=0.05"][::order]
    assert resolve(REGISTRY, overrides=settings).tables["objective"]["ascent"] == SGLD


def test_a_setting_goes_on_top_of_an_old_config(tmp_path: Path) -> None:
    path = saved(tmp_path, {**OLD, "step": "gradient"})
    resolved = resolve(REGISTRY, config=path, overrides=["objective.step_size=0.05"])
    assert resolved.tables["objective"] == {**NEW, "ascent": SGLD}
    path = saved(tmp_path, {**OLD, **PROGRAM})
    resolved = resolve(REGISTRY, config=path, overrides=["objective.step_px=3"])
    assert resolved.tables["objective"] == {**RELEASED, "step_px": 3}


def test_an_unknown_step_is_an_unknown_ascent() -> None:
    with pytest.raises(ConfigError, match=r"no ascent 'sgn'.*did you mean 'sign'"):
        resolve(REGISTRY, overrides=["objective.step=sgn"])


def test_an_old_config_whose_objective_is_replaced_is_not_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {**OLD, "outer": "abs"})
    named = {"objective": {"use": "jem"}}
    assert resolve(REGISTRY, config=path, named=named).tables["objective"]["use"] == "jem"


def test_another_objective_may_have_options_of_these_names() -> None:
    named = {"objective": {"use": "jem"}}
    for option in ("step=gradient", "direction=lower"):
        with pytest.raises(ConfigError, match="no such option"):
            resolve(REGISTRY, named=named, overrides=[f"objective.{option}"])
