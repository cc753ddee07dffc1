"""AWP's perturbation of a network: which weights move, by how much, and in what order."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import Tensor, nn
from toys import backbone_of, gen, objective_of

from jemkit import EnergyModel, Guard, Plain, Terms, train_step
from jemkit.runtime.pytree import same
from jemkit.testing import toy_batch, toy_model, toy_task
from jemkit_plugins.awp import AWP, AWPUpdater

TASK = toy_task()
BATCH = toy_batch(TASK)


def updater_of(
    model: EnergyModel, gamma: float = 0.01, weight_decay: float = 0.0, start: float = 0.0
) -> AWPUpdater:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=weight_decay)
    built = AWP(gamma=gamma, start=start).build(model, sgd)
    assert isinstance(built, AWPUpdater)
    return built


def ascent(
    model: EnergyModel, scale: float = 1.0, gamma: float = 0.01
) -> dict[nn.Parameter, Tensor]:
    model.train()
    loss = scale * F.cross_entropy(model(BATCH.x).logits, BATCH.y)
    for p, g in zip(
        model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
    ):
        p.grad = g
    return updater_of(model, gamma).ascent()


@given(gamma=st.floats(1e-3, 2.0), seed=seeds)
def test_every_matrix_moves_by_gamma_of_its_norm_and_no_bias_or_norm_does(
    gamma: float, seed: int
) -> None:
    model = toy_model(TASK)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(normal(seed + i, *p.shape, scale=0.1))
    shifts = ascent(model, gamma=gamma)
    names = {name: p for name, p in model.named_parameters() if p in shifts}
    assert set(names) == {
        n for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1
    }
    for p, shift in shifts.items():
        assert float(shift.norm() / p.detach().norm()) == pytest.approx(gamma, rel=1e-4)


def test_the_scale_of_the_loss_and_so_the_rate_of_a_proxy_has_no_effect() -> None:
    one, other = ascent(toy_model(TASK)), ascent(toy_model(TASK), scale=50.0)
    for a, b in zip(one.values(), other.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_step_is_taken_at_the_restored_weights_by_the_gradient_of_the_perturbed_ones() -> None:
    model = toy_model(TASK).train()
    recorded: list[Tensor] = []

    def terms() -> Terms:
        recorded.append(model.head.weight.detach().clone())
        loss = F.cross_entropy(model(BATCH.x).logits, BATCH.y)
        return Terms.weighted({"p(y|x)": (1.0, loss)})

    before = model.head.weight.detach().clone()
    updater_of(model, gamma=0.1, weight_decay=0.5).step(terms, Guard())
    assert torch.equal(recorded[0], before)
    assert not torch.equal(recorded[1], before)
    grad = model.head.weight.grad
    torch.testing.assert_close(model.head.weight.detach(), before - 0.1 * (grad + 0.5 * before))


def test_biases_and_norms_stay_bit_for_bit_while_the_matrices_are_moved() -> None:
    model = toy_model(TASK).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved: set[str] = set()

    def terms() -> Terms:
        moved.update(n for n, p in model.named_parameters() if not torch.equal(p, before[n]))
        loss = F.cross_entropy(model(BATCH.x).logits, BATCH.y)
        return Terms.weighted({"p(y|x)": (1.0, loss)})

    updater_of(model).step(terms, Guard())
    assert moved == {n for n, p in model.named_parameters() if p.ndim > 1}


@given(gamma=st.floats(0, 2.0))
def test_with_a_learning_rate_of_0_all_weights_are_restored_bit_for_bit(gamma: float) -> None:
    model = toy_model(TASK).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def terms() -> Terms:
        loss = F.cross_entropy(model(BATCH.x).logits, BATCH.y)
        return Terms.weighted({"p(y|x)": (1.0, loss)})

    AWP(gamma=gamma).build(model, torch.optim.SGD(model.parameters(), lr=0.0)).step(terms, Guard())
    assert same(dict(model.named_parameters()), before)


@pytest.mark.parametrize("objective", ["pgdat", "trades"])
def test_until_its_warm_up_is_over_it_is_plain_bit_for_bit(objective: str) -> None:
    """From 9 of 200 epochs on, as in TRADES-AWP: here from step 9 of 200."""

    def stepped(step: int, *, plain: bool) -> dict[str, Tensor]:
        backbone = backbone_of("classifier", TASK)
        updater = updater_of(backbone.model, start=0.045)
        updater.total_steps = 200
        sgd = torch.optim.SGD(backbone.model.parameters(), lr=0.1)
        used = Plain().build(backbone.model, sgd) if plain else updater
        batch = BATCH._replace(step=step)
        train_step(backbone, objective_of(objective), used, batch, gen(), Guard())
        return backbone.model.state_dict()

    assert same(stepped(8, plain=False), stepped(8, plain=True))
    assert not same(stepped(9, plain=False), stepped(9, plain=True))
