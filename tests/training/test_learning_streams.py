"""Batch norm learns from streams that pass, or the run is refused."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Generator
from toys import (
    MATRIX,
    REGISTRY,
    backbone_for,
    backbone_of,
    gen,
    objective_of,
    toy_recipe,
    toy_registry,
    updater_of,
)

from jemkit import Backbone, Batch, ConfigError, Guard, Options, Terms, train_step
from jemkit.data import Views
from jemkit.objective import NamesStreams
from jemkit.runtime.modes import batch_norms
from jemkit.testing import toy_batch, toy_task
from jemkit.training.build import build_run

TASK = toy_task()
PAIRS = sorted({(backbone, objective) for backbone, objective, _ in MATRIX if objective != "dat"})


def stepped(backbone: Backbone, objective: Any) -> None:
    updater = updater_of("plain", backbone.model)
    train_step(backbone, objective, updater, toy_batch(TASK), gen(), Guard())


def moved(backbone: Backbone) -> bool:
    return all(
        m.running_mean is not None and bool(m.running_mean.any())
        for m in batch_norms(backbone.model)
    )


@pytest.mark.parametrize(("backbone", "objective"), PAIRS)
def test_by_default_batch_norm_learns_on_every_pair(backbone: str, objective: str) -> None:
    built = backbone_for(objective, backbone)
    stepped(built, objective_of(objective))
    assert moved(built)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, {}) for name in sorted(REGISTRY["objective"]) if name != "ducat"],
        ("ducat", {"start": 0}),  # its other streams begin later
        ("jem", {"w_px": 0}), ("jem", {"w_pyx": 0}), ("trades", {"beta": 0}),
        ("ebjdat", {"w2": 0, "w3": 0, "w_clean": 1}), ("ebjdat", {"w1": 0}),
        ("ebjdat", {"w1": 0, "w_clean": 0}),
        ("ebjdat", {"w2": 0, "w_clean": 0}), ("ebjdat", {"w1": 0, "w2": 0}),
    ],
)  # fmt: skip
def test_an_objective_names_the_streams_that_it_passes(name: str, options: dict[str, Any]) -> None:
    objective, built = objective_of(name, **options), backbone_for(name, "sadajem")
    stepped(built, objective)
    assert isinstance(objective, NamesStreams)
    assert set(objective.streams) == built.scored_streams


@pytest.mark.parametrize(
    ("objective", "stats", "passed"),
    [
        ("pgdat", '["x"]', "uses only x_adv"),
        ("ce", '["x_adv"]', "uses only x"),
        ("ce", '["x_pos", "x_neg"]', "uses only x"),
        ("trades", "[]", "names no stream, and this objective uses only x, x_adv"),
        ("jem", '["x_adv"]', "uses only x, x_neg, x_pos"),
    ],
)
def test_statistics_that_no_stream_would_move_are_refused_when_the_run_is_built(
    objective: str, stats: str, passed: str
) -> None:
    backbone = "sadajem" if objective == "jem" else "classifier"
    settings = [f"backbone.views.stats_from={stats}"]
    recipe = toy_recipe(toy_registry(), backbone, objective, "plain", *settings).recipe
    with pytest.raises(ConfigError, match=passed):
        build_run(recipe)


@pytest.mark.parametrize("objective", ["jem", "ebjdat"])
@pytest.mark.parametrize("stream", ["x", "x_pos", "x_neg", "x_adv"])
def test_a_stream_that_passes_is_learnt_from_alone(objective: str, stream: Any) -> None:
    part = objective_of(objective)
    built = backbone_of("sadajem", views=Views(stats_from=(stream,)))
    if stream not in part.streams:  # type: ignore[attr-defined]
        return
    stepped(built, part)
    assert moved(built)


class Mute(Options):
    """An objective that does not say which streams it passes."""

    needs_density: ClassVar[bool] = False

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> None:
        return None

    def loss(self, backbone: Backbone, batch: Batch, draws: None) -> Terms:
        first = backbone.scores({"x": batch.x})["x"].energy.mean()
        second = backbone.scores({"x_pos": batch.x_pos})["x_pos"].energy.mean()
        return Terms.weighted({"E": (1.0, first - 0.5 * second)})


def test_an_objective_that_does_not_say_is_refused_in_its_first_step_which_is_undone() -> None:
    built = backbone_of("classifier", views=Views(stats_from=("x_adv",)))
    before = {name: t.clone() for name, t in built.model.state_dict().items()}
    with pytest.raises(ConfigError, match="uses only x, x_pos: the running statistics"):
        stepped(built, Mute())
    assert all(torch.equal(before[name], t) for name, t in built.model.state_dict().items())
    stepped(backbone_of("classifier", views=Views(stats_from=("x_pos",))), Mute())
