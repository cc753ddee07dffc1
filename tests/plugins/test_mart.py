"""MART: the loss worked by hand, and what its weight and its gradients are."""

from math import log

import pytest
import torch
import torch.nn.functional as F
from logits import batch_of, identity_backbone, logits
from toys import objective_of

from jemkit import Terms
from jemkit_plugins.mart import boosted_cross_entropy, uncertainty

CLEAN, ADV = logits((0.5, 0.3, 0.2)), logits((0.2, 0.6, 0.2))
KL = 0.5 * log(0.5 / 0.2) + 0.3 * log(0.3 / 0.6)


def loss(clean: torch.Tensor, adv: torch.Tensor, y: int = 0, **options: float) -> Terms:
    return objective_of("mart", **options).loss(identity_backbone(3), batch_of(clean, y), adv)


def test_the_loss_worked_by_hand() -> None:
    terms = loss(CLEAN, ADV, beta=6)
    assert float(terms.parts["BCE"][1].detach()) == pytest.approx(
        -log(0.2) - log(1.0001 - 0.6), rel=1e-5
    )
    assert float(terms.parts["KL"][1].detach()) == pytest.approx((1 - 0.5) * KL, rel=1e-5)
    assert float(terms.total.detach()) == pytest.approx(3.2761, abs=1e-4)


def test_the_wrong_class_is_the_second_where_the_first_is_right() -> None:
    value = boosted_cross_entropy(ADV, torch.tensor([1]))
    assert float(value.detach()) == pytest.approx(-log(0.6) - log(1.0001 - 0.2), rel=1e-5)


def test_it_is_a_mean_over_the_batch() -> None:
    both = objective_of("mart").loss(
        identity_backbone(3), batch_of(torch.cat([CLEAN, ADV]), 0, 2), torch.cat([ADV, CLEAN])
    )
    each = [loss(CLEAN, ADV).total, loss(ADV, CLEAN, 2).total]
    torch.testing.assert_close(both.total, torch.stack(each).mean())


def test_a_sure_sample_has_weight_zero_in_the_divergence() -> None:
    sure = torch.tensor([[60.0, 0.0, 0.0]])
    assert float(uncertainty(sure, torch.tensor([0]))) == pytest.approx(0, abs=2e-7)
    assert float(loss(sure, ADV).parts["KL"][1].detach()) == pytest.approx(0, abs=1e-4)


def test_it_is_finite_where_another_class_is_certain() -> None:
    certain = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)
    total = loss(CLEAN, certain).total
    (slope,) = torch.autograd.grad(total, certain)
    assert total.isfinite()
    assert slope.isfinite().all()


def test_clean_and_adversarial_images_are_not_interchangeable() -> None:
    assert float(loss(CLEAN, ADV).total.detach()) != pytest.approx(
        float(loss(ADV, CLEAN).total.detach()), abs=1e-3
    )


def test_clean_logits_have_a_gradient_through_the_divergence_and_through_its_weight() -> None:
    clean = CLEAN.clone().requires_grad_()
    (whole,) = torch.autograd.grad(loss(clean, ADV, beta=1).total, clean)
    y, p = torch.tensor([0]), clean.softmax(1)
    kl = F.kl_div(ADV.log_softmax(1), p, reduction="none").sum(1)
    weight = uncertainty(clean, y)
    parts = [kl.detach() * weight, kl * weight.detach()]
    slopes = [torch.autograd.grad(part.sum(), clean, retain_graph=True)[0] for part in parts]
    torch.testing.assert_close(whole, slopes[0] + slopes[1])
    assert all(slope.abs().max() > 1e-3 for slope in slopes)


def test_without_the_divergence_the_clean_images_are_not_passed() -> None:
    objective = objective_of("mart", beta=0)
    assert objective.streams == ("x_adv",)
    assert list(loss(CLEAN, ADV, beta=0).parts) == ["BCE"]
