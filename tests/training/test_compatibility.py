"""The ball that a run trains in: a radius of its own norm, told wherever the run is judged."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from torch import Generator, Tensor
from toys import REGISTRY, backbone_of, gen, objective_of, toy_recipe, toy_registry

from jemkit import PGD, Backbone, Batch, ConfigError, Options, PartOf, Terms, hookimpl, train
from jemkit.attacks.base import Attack, Threat
from jemkit.config.eval_settings import settings_of, threat_of
from jemkit.config.recipe import Resolved
from jemkit.config.registry import Plugin
from jemkit.evaluation.subjects import subject_at
from jemkit.testing import toy_batch, toy_task
from jemkit.training.build import build_run
from jemkit.training.compatibility import trained_threat

TASK = toy_task()
IN_L2 = {
    "pgdat": ("objective.attack.norm=L2", "objective.attack.radius_px"),
    "trades": ("objective.attack.norm=L2", "objective.attack.radius_px"),
    "ebjdat": ("objective.norm=L2", "objective.radius_px"),
}


def recipe_of(objective: str, *sets: str) -> Resolved:
    return toy_recipe(toy_registry(), "sadajem", objective, "plain", *sets)


@pytest.mark.parametrize("objective", sorted(IN_L2))
def test_another_norm_without_a_radius_is_refused_in_the_words_of_an_evaluation(
    objective: str,
) -> None:
    norm, option = IN_L2[objective]
    with pytest.raises(ConfigError) as ours:
        build_run(recipe_of(objective, norm).recipe)
    with pytest.raises(ConfigError) as theirs:
        threat_of(settings_of({"norm": "L2"}), 8, 64)
    assert str(ours.value).replace(option, "--eps-px") == str(theirs.value)


@pytest.mark.parametrize("objective", sorted(IN_L2))
def test_in_python_it_is_refused_where_it_draws(objective: str) -> None:
    options: dict[str, Any] = {"norm": "L2"}
    options = options if objective == "ebjdat" else {"attack": PGD(norm="L2")}
    backbone = backbone_of("sadajem")
    with pytest.raises(ConfigError, match="the norm L2 has no default radius"):
        objective_of(objective, **options).draw(backbone, toy_batch(TASK), gen())


@pytest.mark.parametrize("objective", sorted(IN_L2))
def test_a_radius_wider_than_the_range_is_refused(objective: str) -> None:
    norm, option = IN_L2[objective]
    with pytest.raises(ConfigError, match=f"{option} 2041 is wider than the whole range, 2040"):
        build_run(recipe_of(objective, norm, f"{option}=2041").recipe)
    with pytest.raises(ConfigError, match="256 is wider than the whole range, 255"):
        build_run(recipe_of(objective, f"{option}=256").recipe)


@pytest.mark.parametrize("objective", sorted(IN_L2))
def test_a_radius_that_is_given_is_the_one_that_is_trained_in(objective: str) -> None:
    norm, option = IN_L2[objective]
    parts = build_run(recipe_of(objective, norm, f"{option}=127.5").recipe)
    parts.backbone.model.train()
    batch = parts.loader.batch()
    drawn = parts.objective.draw(parts.backbone, batch, parts.rng)
    x_adv: Tensor = getattr(drawn, "x_adv", drawn)
    sizes = (x_adv - batch.x).flatten(1).norm(dim=1)
    assert (sizes <= 1 + 1e-4).all()
    assert sizes.max() > 0.5


class Guest(Options):
    """An objective of a stranger's, with an attack of its own."""

    needs_density: ClassVar[bool] = False
    foe: Annotated[Attack, PartOf("attack")] = PGD(norm="L2")

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
        return batch.x

    def loss(self, backbone: Backbone, batch: Batch, draws: Tensor) -> Terms:
        return Terms.weighted({"E(x)": (1.0, backbone.scores({"x": draws})["x"].energy.mean())})


class GuestPlugin:
    @staticmethod
    @hookimpl
    def jemkit_objectives() -> dict[str, Any]:
        return {"guest": Guest}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "objective.foe.radius_px 127.5, which is 0.5, is usual"),
        (["objective.foe.norm=Linf", "objective.foe.restarts=2"], "has one start: restarts"),
    ],
)
def test_the_attack_of_a_guests_objective_is_looked_at_too(
    settings: list[str], message: str
) -> None:
    registry = toy_registry([Plugin("guest", GuestPlugin)])
    with pytest.raises(ConfigError, match=message):
        build_run(toy_recipe(registry, "sadajem", "guest", "plain", *settings).recipe)


@pytest.mark.parametrize("objective", ["pgdat", "trades"])
def test_restarts_which_act_in_judging_alone_are_refused_before_the_first_step(
    objective: str,
) -> None:
    with pytest.raises(ConfigError, match="has one start"):
        build_run(recipe_of(objective, "objective.attack.restarts=2").recipe)


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("ce", {}, None),
        ("jem", {}, None),
        ("pgdat", {}, Threat("Linf", 25.5)),
        ("trades", {"attack": PGD(norm="L2", radius_px=100)}, Threat("L2", 100)),
        ("ebjdat", {"radius_px": 4}, Threat("Linf", 4)),
        ("ebjdatreleased", {}, None),
    ],
)
def test_an_objective_says_which_ball_it_trains_in(
    name: str, options: dict[str, Any], wanted: Threat | None
) -> None:
    assert trained_threat(objective_of(name, **options), 25.5) == wanted


def test_a_run_trained_in_l2_is_validated_and_judged_in_its_own_ball(tmp_path: Path) -> None:
    parts = toy_registry()
    recipe = recipe_of("pgdat", "objective.attack.norm=L2", "objective.attack.radius_px=90")
    summary = train(recipe, tmp_path / "run", registry=parts)
    (pgd,) = (figure for figure in summary.figures if figure.name == "pgd20")
    said = {"norm": "L2", "radius_px": 90, "precision": "fp32"}
    assert said.items() <= pgd.protocol.items()
    assert 80 < pgd.protocol["max_delta_px"]["L2"] <= 90 * (1 + 1e-4)
    about = subject_at(tmp_path / "run", parts, torch.device("cpu")).about
    assert (about["trained_norm"], about["trained_radius_px"]) == ("L2", 90)


def test_a_recipe_that_was_trained_without_a_radius_of_its_norm_is_still_read() -> None:
    recipe = recipe_of("pgdat", "objective.attack.norm=L2").recipe
    assert trained_threat(recipe.objective, 25.5) == Threat("L2", 25.5)


def test_every_attack_that_is_shipped_and_can_train_is_in_a_ball() -> None:
    for name, part in REGISTRY["attack"].items():
        if hasattr(part, "draw"):
            assert trained_threat(part(), 8) == Threat("Linf", 8), name
