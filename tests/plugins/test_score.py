"""SCORE: the loss worked by hand, its threshold, and its gradient through p(x)."""

import pytest
import torch
from logits import batch_of, identity_backbone, logits
from toys import backbone_of, gen, objective_of

from jemkit import PGD, Terms
from jemkit.testing import toy_batch, toy_task
from jemkit_plugins.score import squared

CLEAN, ADV = logits((0.5, 0.3, 0.2)), logits((0.2, 0.6, 0.2))


def loss(clean: torch.Tensor, adv: torch.Tensor | None, **options: float) -> Terms:
    return objective_of("score", **options).loss(identity_backbone(3), batch_of(clean, 0), adv)


def test_the_loss_worked_by_hand() -> None:
    terms = loss(CLEAN, ADV, beta=4)
    assert float(terms.parts["p(y|x)"][1].detach()) == pytest.approx(0.25 + 0.09 + 0.04, rel=1e-5)
    assert float(terms.parts["|p(x~) - p(x)|^2"][1].detach()) == pytest.approx(
        0.09 + 0.09, rel=1e-5
    )
    assert float(terms.total.detach()) == pytest.approx(0.38 + 4 * 0.18, rel=1e-5)


def test_distances_up_to_c_cost_nothing() -> None:
    assert float(loss(CLEAN, ADV, c=0.1).parts["|p(x~) - p(x)|^2"][1].detach()) == pytest.approx(
        0.08, rel=1e-4
    )
    assert float(loss(CLEAN, ADV, c=0.2).parts["|p(x~) - p(x)|^2"][1].detach()) == 0


def test_smoothing_shares_a_part_of_the_label_among_all_classes() -> None:
    terms = loss(CLEAN, ADV, smoothing=0.3).parts["p(y|x)"][1]
    assert float(terms.detach()) == pytest.approx((0.5 - 0.8) ** 2 + 0.2**2 + 0.1**2, rel=1e-5)


def test_p_of_x_is_not_detached_in_the_distance() -> None:
    clean = CLEAN.clone().requires_grad_()
    distance = loss(clean, ADV).parts["|p(x~) - p(x)|^2"][1]
    (slope,) = torch.autograd.grad(distance, clean)
    assert slope.abs().max() > 1e-3


def test_the_attack_raises_the_squared_distance_inside_the_ball() -> None:
    task = toy_task()
    backbone, batch = backbone_of("classifier", task), toy_batch(task)
    start, x_adv = (
        objective_of("score", attack=PGD(steps=n)).draw(backbone, batch, gen()) for n in (0, 3)
    )
    limit = task.bounds.px(task.radius_px)
    assert 0 < float((x_adv - batch.x).abs().max()) <= limit + 1e-6
    backbone.model.eval()
    clean, begun, adv = (backbone.model(x).logits.softmax(1) for x in (batch.x, start, x_adv))
    assert (squared(clean, adv) > squared(clean, begun)).all()


def test_without_the_distance_no_attack_runs() -> None:
    objective = objective_of("score", beta=0)
    task = toy_task()
    assert objective.draw(backbone_of("classifier", task), toy_batch(task), gen()) is None
    assert objective.streams == ("x",)
    assert list(loss(CLEAN, None, beta=0).parts) == ["p(y|x)"]
