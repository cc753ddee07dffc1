"""WEAT: the weights, the two losses worked by hand, and that the weights are detached."""

from math import exp, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logits import batch_of, identity_backbone, logits
from toys import gen, objective_of

from jemkit import Terms
from jemkit.testing import toy_batch, toy_task
from jemkit_plugins.weat import weights

CLEAN, ADV = logits((0.5, 0.3, 0.2), energy=-2.0), logits((0.2, 0.6, 0.2), energy=-5.0)
KL = 0.5 * log(0.5 / 0.2) + 0.3 * log(0.3 / 0.6)
W = 1 / log(1 + exp(2.0))


def loss(clean: torch.Tensor, adv: torch.Tensor | None, **options: object) -> Terms:
    return objective_of("weat", **options).loss(identity_backbone(3), batch_of(clean, 0), adv)


@pytest.mark.parametrize(("of", "p"), [("adversarial", 0.2), ("natural", 0.5)])
def test_the_loss_worked_by_hand(of: str, p: float) -> None:
    value = loss(CLEAN, ADV, of=of, beta=6).total
    assert float(value.detach()) == pytest.approx(W * (-log(p) + 6 * KL), rel=1e-5)


@given(energy=st.floats(-1e4, 1e4))
def test_a_weight_is_at_most_one_over_log_2_and_falls_with_the_size_of_the_energy(
    energy: float,
) -> None:
    at, mirrored, farther = weights(torch.tensor([energy, -energy, 1.5 * energy])).tolist()
    assert 0 < farther <= at <= 1 / log(2) + 1e-6
    assert at == mirrored


def test_weights_at_zero_and_far_away() -> None:
    result = weights(torch.tensor([0.0, 80.0, -1e4]))
    torch.testing.assert_close(result, torch.tensor([1 / log(2), 1 / 80, 1e-4]))


def test_the_weights_are_detached_and_of_the_clean_images() -> None:
    clean = CLEAN.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(clean, ADV, of="natural", beta=0).total, clean)
    expected = W * (torch.tensor([[0.5, 0.3, 0.2]]) - torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(slope, expected)  # w times that of the cross-entropy alone


def test_it_is_trades_where_all_weights_are_one() -> None:
    one = -log(exp(1.0) - 1)  # log(1 + exp |E|) = 1
    clean, adv = logits((0.5, 0.3, 0.2), energy=one), logits((0.2, 0.6, 0.2))
    trades = objective_of("trades").loss(identity_backbone(3), batch_of(clean, 0), adv)
    torch.testing.assert_close(loss(clean, adv, of="natural").total, trades.total)


def test_without_a_divergence_the_natural_loss_runs_no_attack() -> None:
    objective = objective_of("weat", of="natural", beta=0)
    assert objective.draw(identity_backbone(3), toy_batch(toy_task()), gen()) is None
    assert objective.streams == ("x",)
    assert list(loss(CLEAN, None, of="natural", beta=0).parts) == ["p(y|x)"]
