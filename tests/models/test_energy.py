"""Energies are what Eqs. 1 and 3 say, for any number of classes and in any precision."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import logits, normal, seeds
from torch import Tensor, nn
from toys import gen, linear_model

from jemkit import Backbone, LogSumExpEnergy, ModelEnergy, Scores
from jemkit.models.energy import LinearEnergy, LogitEnergy
from jemkit.models.networks import Adapted, seeded_init
from jemkit.testing import toy_model, toy_task


def scores_of(f: Tensor) -> Scores:
    """JEM's reading of logits."""
    return LogitEnergy(Adapted(nn.Identity(), f.shape[1])).read(f)


def every_joint(scores: Scores) -> Tensor:
    """E(x, y) for every y, [B, K]."""
    n, k = scores.logits.shape
    return torch.stack([scores.joint(torch.full((n,), y)) for y in range(k)], dim=1)


@given(f=logits())
def test_the_energy_is_minus_the_logsumexp_of_the_logits(f: Tensor) -> None:
    energy = scores_of(f).energy
    assert energy.shape == (len(f),)
    torch.testing.assert_close(energy, -f.double().exp().sum(1).log().float(), rtol=1e-5, atol=1e-5)


@given(f=logits())
def test_the_joint_energy_is_minus_the_logit_of_the_class(f: Tensor) -> None:
    joint = every_joint(scores_of(f))
    assert joint.shape == f.shape  # [B] for each class: never [B, 1], which would spread to [B, B]
    torch.testing.assert_close(joint, -f, rtol=1e-5, atol=1e-4)


@given(f=logits())
def test_logsumexp_over_classes_of_minus_the_joint_energy_is_minus_the_energy(f: Tensor) -> None:
    scores = scores_of(f)
    together = every_joint(scores).neg().logsumexp(dim=1)
    torch.testing.assert_close(together, -scores.energy, rtol=1e-5, atol=1e-4)


@given(f=logits(), c=st.floats(-50, 50))
def test_a_constant_on_all_logits_shifts_every_energy_by_minus_it_and_nothing_else(
    f: Tensor, c: float
) -> None:
    before, after = scores_of(f), scores_of(f + c)
    y = torch.arange(len(f)) % f.shape[1]
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(after.energy, before.energy - c, **close)
    torch.testing.assert_close(after.joint(y), before.joint(y) - c, **close)
    torch.testing.assert_close(after.logits.softmax(1), before.logits.softmax(1), **close)
    loss = F.cross_entropy(after.logits, y, reduction="none")
    torch.testing.assert_close(after.joint(y) - after.energy, loss, **close)


@given(f=logits())
def test_cross_entropy_is_the_joint_energy_less_the_energy_and_not_negative(f: Tensor) -> None:
    scores = scores_of(f)
    for y in range(min(3, f.shape[1])):
        label = torch.full((len(f),), y)
        loss = scores.joint(label) - scores.energy
        expected = F.cross_entropy(f, label, reduction="none")
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
        assert (loss >= -1e-5).all()


@given(seed=seeds)
def test_the_gradient_of_the_logsumexp_is_the_mean_gradient_of_the_logits(seed: int) -> None:
    model = linear_model(12, 3, seed).double()
    x = normal(seed, 2, 12, dtype=torch.float64).requires_grad_()
    f = model.head(x)
    (slope,) = torch.autograd.grad(f.logsumexp(1).sum(), x)
    torch.testing.assert_close(slope, f.softmax(1) @ model.head.weight, rtol=1e-10, atol=1e-10)


def test_an_energy_worked_by_hand() -> None:
    f = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    scores = scores_of(f)
    torch.testing.assert_close(scores.energy, torch.tensor([-1.0986123, -3.4076059]))
    torch.testing.assert_close(scores.joint(torch.tensor([2, 0])), torch.tensor([0.0, -1.0]))


def test_energies_are_float32_and_exact_where_the_passes_run_in_bfloat16() -> None:
    model = linear_model(12, 10)
    with torch.no_grad():
        model.head.weight.mul_(1e4)
    x = normal(0, 4, 1, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(x)
    assert scores.energy.dtype == scores.logits.dtype == torch.float32
    assert scores.energy.isfinite().all()  # of some 1e5: float16 would be inf
    exact = -scores.logits.double().logsumexp(1)
    torch.testing.assert_close(scores.energy.double(), exact, rtol=1e-6, atol=1e-6)


@given(f=logits(), seed=seeds)
def test_the_energy_head_of_mebm_is_apart_from_its_logits(f: Tensor, seed: int) -> None:
    with seeded_init(torch.Generator().manual_seed(seed)):
        model = LinearEnergy(Adapted(nn.Identity(), f.shape[1]), 3)
    scores = model.read(f)
    assert scores.energy.shape == (len(f),)
    torch.testing.assert_close(
        scores.energy, -(f @ model.energy.weight.T + model.energy.bias)[:, 0]
    )
    y = torch.arange(len(f)) % 3
    joint = scores.energy - scores.logits.log_softmax(1)[torch.arange(len(f)), y]
    torch.testing.assert_close(scores.joint(y), joint, rtol=1e-4, atol=1e-4)


def test_the_energy_of_a_model_goes_through_its_stem_and_trunk() -> None:
    task = toy_task()
    model, x = toy_model(task).eval(), normal(0, 4, *task.shape)
    y = torch.tensor([0, 1, 2, 0])
    for energy in (ModelEnergy(model), ModelEnergy(model, y)):
        torch.testing.assert_close(energy.trunk(energy.stem(x)), energy(x))
    torch.testing.assert_close(ModelEnergy(model, y)(x), model(x).joint(y))


def test_scores_of_a_joint_pass_split_into_their_streams() -> None:
    scores = scores_of(normal(0, 7, 3))
    first, second = scores.split([3, 4])
    assert torch.equal(torch.cat([first.energy, second.energy]), scores.energy)
    assert torch.equal(second.logits, scores.logits[3:])


def test_a_plain_torch_module_of_logits_is_an_energy_model() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    backbone = Backbone.of_module(module, shape=(1, 3, 4), n_classes=3, rng=gen())
    x = normal(0, 4, 1, 3, 4)
    scores = backbone.model(x)
    assert torch.equal(scores.logits, module(x))
    torch.testing.assert_close(scores.energy, -module(x).logsumexp(1))
    assert backbone.has_density
    assert isinstance(linear_model(4, 3), LogSumExpEnergy)


@given(seed=seeds)
def test_energies_are_read_in_float32_whatever_the_network_ran_in(seed: int) -> None:
    model = toy_model(toy_task())
    features = normal(seed, 4, model.network.width, scale=20.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.scores(features)
    outside = model.scores(features)
    assert torch.equal(inside.logits, outside.logits)
    assert torch.equal(inside.energy, outside.energy)
