"""AWP's perturbation of a network: which weights move, by how much, and in what order."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jemkit import EnergyModel, Guard, Terms
from jemkit.testing import toy_batch, toy_model, toy_task
from jemkit_plugins.awp import AWP, AWPUpdater

TASK = toy_task()
BATCH = toy_batch(TASK)


def updater_of(model: EnergyModel, gamma: float = 0.01, weight_decay: float = 0.0) -> AWPUpdater:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=weight_decay)
    built = AWP(gamma=gamma).build(model, sgd)
    assert isinstance(built, AWPUpdater)
    return built


def ascent(model: EnergyModel, scale: float = 1.0) -> dict[nn.Parameter, Tensor]:
    model.train()
    loss = scale * F.cross_entropy(model(BATCH.x).logits, BATCH.y)
    for p, g in zip(
        model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
    ):
        p.grad = g
    return updater_of(model).ascent()


def test_every_matrix_moves_by_gamma_of_its_norm_and_no_bias_or_norm_does() -> None:
    model = toy_model(TASK)
    shifts = ascent(model)
    names = {name: p for name, p in model.named_parameters() if p in shifts}
    assert set(names) == {
        n for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1
    }
    for p, shift in shifts.items():
        assert float(shift.norm() / p.detach().norm()) == pytest.approx(0.01, rel=1e-4)


def test_the_scale_of_the_loss_and_so_the_rate_of_a_proxy_has_no_effect() -> None:
    one, other = ascent(toy_model(TASK)), ascent(toy_model(TASK), scale=50.0)
    for a, b in zip(one.values(), other.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_step_is_taken_at_the_restored_weights_by_the_gradient_of_the_perturbed_ones() -> None:
    model = toy_model(TASK).train()
    seen: list[Tensor] = []

    def terms() -> Terms:
        seen.append(model.head.weight.detach().clone())
        loss = F.cross_entropy(model(BATCH.x).logits, BATCH.y)
        return Terms.weighted({"p(y|x)": (1.0, loss)})

    before = model.head.weight.detach().clone()
    updater_of(model, gamma=0.1, weight_decay=0.5).step(terms, Guard())
    assert torch.equal(seen[0], before)
    assert not torch.equal(seen[1], before)
    grad = model.head.weight.grad
    torch.testing.assert_close(model.head.weight.detach(), before - 0.1 * (grad + 0.5 * before))
