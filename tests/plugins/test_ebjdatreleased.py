"""EB-JDAT's released program, term by term; benchmarks/naive.py repeats its schedule."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import radii_px, seeds, uniform
from toys import backbone_of, gen, linear_model, objective_of

from jemkit import Backbone, Batch
from jemkit.models.distances import LogitDistance
from jemkit.testing import toy_backbone, toy_batch, toy_task
from jemkit_plugins.ebjdatreleased import Draws, EBJDATReleased

TASK = toy_task()


def far(backbone: Backbone, batch: Batch, x_adv: torch.Tensor) -> float:
    return float(LogitDistance().bind(backbone.model, batch.x, TASK.bounds)(x_adv).mean())


def start_and_end(climbs: str) -> tuple[Backbone, Batch, list[torch.Tensor]]:
    backbone, batch = backbone_of("jem"), toy_batch(TASK, 12)
    backbone.model.eval()
    chains = []
    for steps in (0, 5):
        objective = objective_of("ebjdatreleased", adv_steps=steps, climbs=climbs)
        chains.append(objective.draw(backbone_of("jem"), batch, gen()).x_adv)
    return backbone, batch, chains


def test_its_x_adv_lowers_the_joint_energy_and_goes_away_from_x() -> None:
    backbone, batch, (start, end) = start_and_end("logit")
    with torch.no_grad():
        before, after = (backbone.model(x).joint(batch.y) for x in (start, end))
        assert (after < before).all()
        assert far(backbone, batch, end) > far(backbone, batch, start)


def test_the_line_that_is_commented_out_raises_the_cross_entropy() -> None:
    backbone, batch, chains = start_and_end("ce")
    with torch.no_grad():
        before, after = (F.cross_entropy(backbone.model(x).logits, batch.y) for x in chains)
    assert after > before


@given(seed=seeds, start=radii_px, step_px=st.floats(0.1, 4), steps=st.integers(0, 6))
def test_its_reach_is_the_start_and_every_step(
    seed: int, start: float, step_px: float, steps: int
) -> None:
    x = uniform(seed, 3, *TASK.shape, low=-0.5, high=0.5)
    batch = Batch(x, torch.arange(3), x[:0], torch.arange(3))
    objective = objective_of(
        "ebjdatreleased", start_px=start, step_px=step_px, adv_steps=steps, w1=1
    )
    backbone = toy_backbone(TASK, linear_model(64, 3))
    x_adv = objective.draw(backbone, batch, gen(seed)).x_adv
    reach = float((x_adv - x).abs().max())
    assert reach <= 2 * (start + steps * step_px) / 255 + 1e-5
    if steps:
        assert reach > 2 * (steps * step_px - start) / 255 - 1e-5
    assert x_adv.abs().max() <= 1


def test_by_default_it_reaches_nine_pixels() -> None:
    """Start 8/255 and five steps of 2/255, in the units of [-1, 1]."""
    batch = Batch(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), torch.zeros(0), torch.zeros(0))
    backbone = toy_backbone(TASK, linear_model(64, 3))
    reach = float(EBJDATReleased().draw(backbone, batch, gen()).x_adv.abs().max())
    assert 2 * 8.5 / 255 < reach <= 2 * 9 / 255 + 1e-6


@pytest.mark.parametrize("weights", [(1.0, 0.1, 1.0, 1.0), (0.45, 0.05, 0.45, 0.45)])
def test_its_loss_is_that_of_the_program(weights: tuple[float, ...]) -> None:
    backbone, batch = toy_backbone(TASK, linear_model(64, 3)), toy_batch(TASK, 6, positives=4)
    draws = Draws(uniform(1, 4, *TASK.shape), uniform(2, 6, *TASK.shape))
    w1, w2, w3, w_clean = weights
    objective = EBJDATReleased(w1=w1, w2=w2, w3=w3, w_clean=w_clean)
    f = [backbone.model(x).logits for x in (batch.x, batch.x_pos, *draws)]
    lse = [logits.logsumexp(1).mean() for logits in f]
    by_hand = (
        w1 * (lse[2] - lse[1])
        + w2 * (lse[3] - lse[1])
        + w3 * F.cross_entropy(f[3], batch.y)
        + w_clean * F.cross_entropy(f[0], batch.y)
    )
    terms = objective.loss(backbone, batch, draws)
    torch.testing.assert_close(terms.total, by_hand, rtol=1e-4, atol=1e-5)
