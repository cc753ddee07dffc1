"""JEAT, as reconstructed: -log p(x~, y), which no constant shift of the logits changes."""

import pytest
import torch
from toys import gen, linear_model, objective_of

from jemkit.testing import toy_backbone, toy_batch, toy_task

TASK = toy_task()
BATCH = toy_batch(TASK, 6, positives=4)


def test_the_loss_is_the_joint_energy_of_x_adv_less_that_of_the_negatives() -> None:
    backbone, objective = toy_backbone(TASK, linear_model(64, 3)), objective_of("jeat")
    draws = objective.draw(backbone, BATCH, gen())
    assert len(draws.x_neg) == 4
    terms, model = objective.loss(backbone, BATCH, draws), backbone.model
    expected = model(draws.x_adv).joint(BATCH.y).mean() - model(draws.x_neg).energy.mean()
    torch.testing.assert_close(terms.total, expected)


def test_a_constant_shift_of_the_logits_changes_nothing() -> None:
    backbone, objective = toy_backbone(TASK, linear_model(64, 3)), objective_of("jeat")
    draws = objective.draw(backbone, BATCH, gen())
    before = objective.loss(backbone, BATCH, draws).total
    with torch.no_grad():
        backbone.model.head.bias += 7.0
    torch.testing.assert_close(objective.loss(backbone, BATCH, draws).total, before)


def test_x_adv_raises_the_joint_energy_inside_the_ball() -> None:
    backbone = toy_backbone(TASK, linear_model(64, 3))
    x_adv = objective_of("jeat").draw(backbone, BATCH, gen()).x_adv
    energies = (backbone.model(x).joint(BATCH.y).mean() for x in (BATCH.x, x_adv))
    clean, adv = energies
    assert adv > clean
    assert float((x_adv - BATCH.x).abs().max()) <= TASK.bounds.px(TASK.radius_px) + 1e-6


def test_without_its_density_it_is_the_cross_entropy_and_runs_no_chain() -> None:
    backbone, objective = toy_backbone(TASK), objective_of("jeat", w_px=0)
    before = backbone.density.state_dict()["states"].clone()
    draws = objective.draw(backbone, BATCH, gen())
    assert draws.x_neg is None
    assert torch.equal(backbone.density.state_dict()["states"], before)
    assert list(objective.loss(backbone, BATCH, draws).parts) == ["p(y|x~)"]
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        objective_of("jeat", w_px=-1)
