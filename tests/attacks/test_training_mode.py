"""Batch norm in training attacks: by running statistics, by the batch's, or in train mode."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor
from toys import REGISTRY, backbone_for, backbone_of, gen, objective_of, toy_recipe, toy_registry

from jemkit import PGD, Backbone, ConfigError, PixelModel, Threat, attack_mode, resolve
from jemkit.runtime.modes import BatchNormMode, batch_norms
from jemkit.runtime.pytree import same
from jemkit.testing import toy_batch, toy_task
from jemkit.testing.law import state_of

TASK = toy_task()
BATCH = toy_batch(TASK)
ATTACKED = sorted(
    name for name, part in REGISTRY["objective"].items() if "attack" in part.model_fields
)
"""Objectives with an attack of their own."""


def attacked(backbone: Backbone, x: Tensor, mode: BatchNormMode, seed: int = 0) -> Tensor:
    """x~ by three steps on the cross-entropy of class 0."""
    y = torch.zeros(len(x), dtype=torch.int64)
    return PGD(steps=3, batch_norm=mode).draw(
        backbone.model, lambda z: F.cross_entropy(backbone.model(z).logits, y, reduction="none"), x,
        gen(seed), bounds=backbone.bounds, radius_px=backbone.radius_px,
    )  # fmt: skip


@given(seed=seeds, other=st.integers(1, 5))
def test_batch_statistics_couple_the_images_and_running_ones_do_not(seed: int, other: int) -> None:
    backbone, changed = backbone_of("classifier", TASK, seed % 9), BATCH.x.clone()
    changed[other] = -changed[other] + 0.3
    for mode, coupled in (("running_stats", False), ("batch_stats", True)):
        one, two = (attacked(backbone, x, mode, seed) for x in (BATCH.x, changed))  # type: ignore[arg-type]
        assert bool((one[0] != two[0]).any()) == coupled, mode


@pytest.mark.parametrize("mode", ["running_stats", "batch_stats", "released"])
def test_only_train_mode_updates_running_statistics_and_no_mode_is_left_changed(
    mode: BatchNormMode,
) -> None:
    backbone = backbone_of("classifier", TASK)
    before = state_of(backbone.model)
    attacked(backbone, BATCH.x, mode)
    assert same(state_of(backbone.model), before) == (mode != "released")
    assert all(m.training for m in backbone.model.modules())
    assert all(p.requires_grad for p in backbone.model.parameters())


def test_batch_statistics_are_those_of_train_mode() -> None:
    """Worked by hand: the first gradient step, with a network in plain train mode."""
    backbone = backbone_of("classifier", TASK)
    model, limit = backbone.model, backbone.bounds.px(backbone.radius_px)
    attack = PGD(steps=1, start="clean", step_px=backbone.radius_px, batch_norm="batch_stats")
    x = BATCH.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x).logits, BATCH.y, reduction="sum"), x)
    wanted = backbone.bounds.clamp(BATCH.x + limit * slope.sign())
    x_adv = objective_of("pgdat", attack=attack).draw(backbone, BATCH, gen())
    torch.testing.assert_close(x_adv, wanted)


def modes_in(name: str, mode: BatchNormMode) -> list[tuple[bool, bool]]:
    """Of every pass of a draw: whether batch norm is in train mode, and tracks statistics."""
    chains = "dat" if name == "dat" else "sadajem" if name == "jeat" else "classifier"
    backbone = backbone_for(name, chains)
    (norm, *_), recorded = batch_norms(backbone.model), []

    def watch(*_: object) -> None:
        recorded.append((norm.training, norm.track_running_stats))

    backbone.model.network.register_forward_hook(watch)
    options = {"w_px": 0} if name == "jeat" else {}
    attack = PGD(steps=2, batch_norm=mode)
    objective_of(name, attack=attack, **options).draw(backbone, toy_batch(TASK), gen())
    return recorded


@pytest.mark.parametrize("name", ATTACKED)
def test_all_passes_of_an_attack_are_in_its_mode_also_that_of_clean_images(name: str) -> None:
    passes = {
        "running_stats": (False, True), "batch_stats": (True, False), "released": (True, True),
    }  # fmt: skip
    for mode, wanted in passes.items():
        recorded = modes_in(name, mode)  # type: ignore[arg-type]
        chains = 2 if name == "dat" else 0  # the two passes of its AUC, in eval mode
        assert len(recorded) - chains in (2, 3), (
            name
        )  # two steps, and clean images where it has them
        assert set(recorded[chains:]) == {wanted}, (name, mode)
    assert len(modes_in("score", "batch_stats")) == len(modes_in("trades", "batch_stats")) == 3


def test_an_attack_without_the_option_is_in_eval_mode() -> None:
    class Other:
        def draw(self, *args: object, **options: object) -> Tensor:
            raise NotImplementedError

    model = backbone_of("classifier", TASK).model
    for attack, training in ((Other(), False), (PGD(), False), (PGD(batch_norm="released"), True)):
        with attack_mode(attack, model):
            assert all(norm.training == training for norm in batch_norms(model))


def test_an_evaluated_model_has_running_statistics() -> None:
    subject = PixelModel(backbone_of("classifier", TASK).model, TASK.bounds)
    with pytest.raises(ConfigError, match=r'pgd.batch_norm is "batch_stats", which is for train'):
        PGD(batch_norm="batch_stats").bind(subject, Threat("Linf", 8))


def test_without_batch_norm_the_option_is_refused() -> None:
    group = "backbone.network.norm=group"
    option = "objective.attack.batch_norm=batch_stats"
    with pytest.raises(ConfigError, match=r"attack.batch_norm = 'batch_stats' does nothing on a"):
        toy_recipe(toy_registry(), "classifier", "pgdat", "plain", group, option)
    toy_recipe(toy_registry(), "classifier", "pgdat", "plain", option)
    toy_recipe(toy_registry(), "classifier", "ce", "plain", group)


@pytest.mark.parametrize("name", ["score", "score-released", "betterdm", "gowal"])
def test_presets_of_trainers_on_generated_images_attack_as_their_programs(name: str) -> None:
    objective = resolve(REGISTRY, preset=name, overrides=["data.use=cifar10"]).recipe.objective
    assert objective.attack.batch_norm == "batch_stats"  # type: ignore[union-attr]
