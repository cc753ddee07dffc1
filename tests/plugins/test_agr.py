"""AGR's surgery worked by hand and over random gradients, and when it begins."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import nn
from torch.optim import Optimizer
from toys import backbone_of, gen, objective_of, toy_recipe, toy_registry

from jemkit import (
    Backbone,
    EnergyModel,
    Guard,
    MisfitError,
    Options,
    Plain,
    Updater,
    UpdaterSpec,
    soft_labels,
    train_step,
)  # fmt: skip
from jemkit.data import Mixed
from jemkit.runtime import fsdp
from jemkit.runtime.pytree import same
from jemkit.testing import toy_batch, toy_task
from jemkit.training.build import build_run
from jemkit.updaters import PlainUpdater, StepAware
from jemkit_plugins.agr import AGR, AGRUpdater, clipped, surgery
from jemkit_plugins.awp import AWP

TASK = toy_task()
BATCH = toy_batch(TASK)
TOTAL = 10  # steps of a run, so that it acts from the eighth on


def test_surgery_worked_by_hand() -> None:
    c = 0.5**0.5  # of (1, 1) and (1, 0)
    result = surgery(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(result, torch.tensor([1.0, 1 - c]))
    result = surgery(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(result, torch.tensor([0.0, 1.0]))


@given(seed=seeds, n=st.integers(1, 20), k=st.floats(0.01, 100))
def test_of_one_direction_it_is_g2_and_of_right_angles_g1(seed: int, n: int, k: float) -> None:
    g = normal(seed, n, 2)
    torch.testing.assert_close(surgery(k * g, g), g, rtol=1e-3, atol=1e-5)
    turned = torch.stack([-g[:, 1], g[:, 0]], 1)
    torch.testing.assert_close(surgery(g, turned), g, rtol=1e-3, atol=1e-5)


@given(seed=seeds, n=st.integers(2, 20), scale=st.floats(0.001, 1000))
def test_where_they_oppose_nothing_is_left_along_g2(seed: int, n: int, scale: float) -> None:
    g1, g2 = normal(seed, n), scale * normal(seed + 1, n)
    if (g1 * g2).sum() > 0:
        g2 = -g2
    along = (surgery(g1, g2) * g2).sum() / (g1.norm() * g2.norm())
    assert abs(float(along)) < 1e-5


@given(seed=seeds, n=st.integers(1, 20), scale=st.floats(0.001, 1000))
def test_no_update_opposes_the_clean_gradient(seed: int, n: int, scale: float) -> None:
    g1, g2 = normal(seed, n), scale * normal(seed + 1, n)
    result = surgery(g1, g2)
    assert float((result * g2).sum()) >= -1e-5 * float(g1.norm() * g2.norm())


@given(seed=seeds, scale=st.sampled_from([0.0, 1e-8, 0.01, 1.0, 1e4]))
def test_no_clean_gradient_leaves_g1_and_the_norm_is_bounded(seed: int, scale: float) -> None:
    g1 = scale * normal(seed, 3, 4)
    assert torch.equal(surgery(g1, torch.zeros(3, 4)), g1)
    assert torch.equal(surgery(torch.zeros(3, 4), torch.zeros(3, 4)), torch.zeros(3, 4))
    short = clipped(g1, 0.1)
    assert float(short.norm()) <= 0.1 * (1 + 1e-5)
    assert torch.equal(short, g1) or float(g1.norm()) > 0.1


def test_what_is_not_finite_stays_so() -> None:
    bad = torch.tensor([torch.nan, 1.0])
    assert not clipped(surgery(bad, torch.ones(2)), 0.1).isfinite().all()
    assert not clipped(surgery(torch.ones(2), bad), 0.1).isfinite().all()


def stepped(spec: UpdaterSpec, objective: str, step: int, total: int = TOTAL) -> Backbone:
    backbone = backbone_of("classifier", TASK)
    optimizer = torch.optim.SGD(backbone.model.parameters(), lr=0.1, momentum=0.9)
    updater = spec.build(backbone.model, optimizer)
    if isinstance(updater, StepAware):
        updater.total_steps = total
    chosen, batch = objective_of(objective), BATCH._replace(step=step)
    train_step(backbone, chosen, updater, batch, gen(), Guard())
    return backbone


@pytest.mark.parametrize("objective", ["pgdat", "trades", "mart"])
def test_before_its_start_it_is_plain_bit_for_bit_and_after_it_is_not(objective: str) -> None:
    plain = stepped(Plain(), objective, 7).model.state_dict()
    assert same(stepped(AGR(), objective, 7).model.state_dict(), plain)
    assert not same(stepped(AGR(), objective, 8).model.state_dict(), plain)
    assert same(stepped(AGR(start=1), objective, 9).model.state_dict(), plain)
    assert not same(stepped(AGR(start=0.7), objective, 7).model.state_dict(), plain)


@pytest.mark.parametrize("objective", ["pgdat", "trades", "mart"])
def test_every_tensor_has_its_own_surgery(objective: str) -> None:
    moved = stepped(AGR(clip=0.05), objective, 9).model
    backbone = backbone_of("classifier", TASK)
    chosen = objective_of(objective)
    draws = chosen.draw(backbone, BATCH, gen())
    params = [*backbone.model.parameters()]
    clean = F.cross_entropy(backbone.model(BATCH.x).logits, BATCH.y)
    g2 = torch.autograd.grad(clean, params)
    g1 = torch.autograd.grad(chosen.loss(backbone, BATCH, draws).total, params)
    for p, a, b, q in zip(params, g1, g2, moved.parameters(), strict=True):
        wanted = clipped(surgery(a, b), 0.05)
        assert float(wanted.norm()) <= 0.05 * (1 + 1e-5)
        torch.testing.assert_close(q.detach(), p.detach() - 0.1 * wanted)


def test_running_statistics_learn_from_the_objectives_own_passes_alone() -> None:
    late, plain = (
        dict(stepped(spec, "pgdat", 9).model.named_buffers()) for spec in (AGR(), Plain())
    )
    assert late
    assert same(late, plain)


def test_a_run_tells_it_its_length() -> None:
    parts = build_run(toy_recipe(toy_registry(), "classifier", "trades", "agr").recipe)
    assert isinstance(parts.updater, AGRUpdater)
    assert parts.updater.total_steps == parts.task.total_steps > 0


def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: EnergyModel = backbone_of("classifier", TASK).model
    monkeypatch.setattr(fsdp, "is_sharded", lambda t: True)
    with pytest.raises(MisfitError, match="omit --shard"):
        AGR().build(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_with_awp_g1_is_of_the_perturbed_weights_and_g2_of_the_weights_themselves() -> None:
    awp, clip = AWP(gamma=0.3), 0.05
    moved = stepped(AGR(clip=clip, update=awp), "pgdat", 9).model
    backbone, chosen = backbone_of("classifier", TASK), objective_of("pgdat")
    params = [*backbone.model.parameters()]
    draws = chosen.draw(backbone, BATCH, gen())
    g2 = torch.autograd.grad(F.cross_entropy(backbone.model(BATCH.x).logits, BATCH.y), params)

    def adversarial() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(chosen.loss(backbone, BATCH, draws).total, params)

    began = [p.detach().clone() for p in params]
    for p, g in zip(params, adversarial(), strict=True):
        if p.ndim > 1:
            p.data += 0.3 * p.detach().norm() * g / g.norm()
    for p, a, b, q in zip(began, adversarial(), g2, moved.parameters(), strict=True):
        wanted = p - 0.1 * clipped(surgery(a, b), clip)
        torch.testing.assert_close(q.detach(), wanted, rtol=1e-4, atol=1e-6)
    assert not same(moved.state_dict(), stepped(AGR(clip=clip), "pgdat", 9).model.state_dict())


@pytest.mark.parametrize("objective", ["pgdat", "trades", "mart"])
def test_before_its_start_it_is_the_other_updater_bit_for_bit(objective: str) -> None:
    inner = AWP(gamma=0.1)
    early = stepped(AGR(update=inner), objective, 7).model.state_dict()
    assert same(early, stepped(inner, objective, 7).model.state_dict())
    assert not same(early, stepped(AGR(), objective, 7).model.state_dict())


def test_the_other_updater_gets_the_batch_and_the_length_of_the_run() -> None:
    late = AWP(gamma=0.1, start=0.95)  # after the surgery has begun
    agr, both = (stepped(AGR(update=u), "pgdat", 9) for u in (Plain(), late))
    assert same(both.model.state_dict(), agr.model.state_dict())
    both = stepped(AGR(update=late, start=0.5), "pgdat", 99, total=100)
    alone = stepped(AGR(start=0.5), "pgdat", 99, total=100)
    assert not same(both.model.state_dict(), alone.model.state_dict())


class Keeping(Options):
    """A guest's updater with a state."""

    def build(self, model: nn.Module, optimizer: Optimizer) -> Updater:
        updater = PlainUpdater(optimizer)
        updater.state_dict = dict  # type: ignore[attr-defined]
        updater.load_state_dict = lambda state: None  # type: ignore[attr-defined]
        return updater


def test_an_updater_with_a_state_is_refused() -> None:
    model = backbone_of("classifier", TASK).model
    with pytest.raises(MisfitError, match=r"updater.update: PlainUpdater keeps a state of its own"):
        AGR(update=Keeping()).build(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_clean_pass_has_the_precision_and_the_labels_of_the_objective() -> None:
    backbone = backbone_of("classifier", TASK)
    updater = AGR(start=0).build(backbone.model, torch.optim.SGD(backbone.model.parameters(), 0.1))
    assert isinstance(updater, AGRUpdater)
    share = torch.full((len(BATCH.y),), 0.25)
    partner = torch.arange(len(BATCH.y)).flip(0)
    mixed = BATCH._replace(mixed=Mixed(partner, share))
    for batch in (BATCH, mixed):
        for narrow in (False, True):
            autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=narrow)
            backbone.autocast = autocast
            updater.begin(backbone, batch)
            assert updater.clean is not None
            with autocast():
                logits = backbone.model(batch.x).logits
            expected = F.cross_entropy(logits, soft_labels(batch, logits.shape[1]))
            torch.testing.assert_close(updater.clean().total, expected)


def test_a_run_in_bf16_has_its_clean_pass_in_bf16() -> None:
    recipe = toy_recipe(toy_registry(), "classifier", "trades", "agr", "run.precision=bf16")
    backbone = build_run(recipe.recipe).backbone
    with backbone.autocast():
        assert torch.is_autocast_enabled("cpu")
