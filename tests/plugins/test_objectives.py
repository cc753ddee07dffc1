"""Totals are linear in their weights, a weight of 0 costs nothing, objectives are formulas."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, uniform, weights
from torch import Tensor, nn
from toys import OBJECTIVES, backbone_for, backbone_of, gen, linear_model, objective_of

from jemkit import (
    PGD,
    Backbone,
    Batch,
    Buffer,
    ConfigError,
    MisfitError,
    Terms,
    ce_adversary,
    kl_adversary,
)  # fmt: skip
from jemkit.testing import toy_backbone, toy_batch, toy_task

TASK = toy_task()


def passes(model: nn.Module) -> list[int]:
    """How many images each forward pass of the network takes from here on."""
    recorded: list[int] = []
    model.network.register_forward_hook(lambda m, args, out: recorded.append(len(args[0])))
    return recorded


def gradient_of(total: Tensor, model: nn.Module) -> Tensor:
    grads = torch.autograd.grad(total, [*model.parameters()], allow_unused=True, retain_graph=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


@given(seed=seeds, a=weights, b=weights)
def test_a_total_is_linear_in_its_weights_and_so_is_its_gradient(
    seed: int, a: float, b: float
) -> None:
    model, x = linear_model(12, 3, seed), uniform(seed, 4, 12)
    y = torch.tensor([0, 1, 2, 0])
    scores = model(x)
    parts = {"E": scores.energy.mean(), "CE": F.cross_entropy(scores.logits, y)}
    terms = Terms.weighted({"E": (a, parts["E"]), "CE": (b, parts["CE"])})
    torch.testing.assert_close(terms.total, a * parts["E"] + b * parts["CE"])
    one, other = (gradient_of(p, model) for p in parts.values())
    result = gradient_of(terms.total, model)
    torch.testing.assert_close(result, a * one + b * other, rtol=1e-4, atol=1e-5)


def test_what_is_watched_is_detached() -> None:
    energy = linear_model(4, 3)(torch.ones(1, 4)).energy.mean()
    terms = Terms.weighted({"E": (1.0, energy)}, {"E(x)": energy})
    assert not terms.watched["E(x)"].requires_grad
    assert terms.total.requires_grad


def test_no_terms_are_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to learn"):
        Terms.weighted({})


def test_standard_training_is_the_cross_entropy_of_clean_images() -> None:
    backbone, batch = backbone_of("classifier"), toy_batch(TASK)
    terms = objective_of("ce").loss(backbone, batch, None)
    expected = F.cross_entropy(backbone.model(batch.x).logits, batch.y)
    torch.testing.assert_close(terms.total, expected)
    assert list(terms.parts) == ["p(y|x)"]


@pytest.mark.parametrize("w_px", [0.0, 0.7])
@pytest.mark.parametrize("w_pyx", [0.0, 1.3])
def test_jem_is_h1_and_the_cross_entropy_with_their_weights(w_px: float, w_pyx: float) -> None:
    backbone, batch = toy_backbone(TASK, linear_model(64, 3)), toy_batch(TASK, 6, positives=4)
    objective = objective_of("jem", w_px=w_px, w_pyx=w_pyx)
    before = backbone.density.buffer.states.clone()
    draws = objective.draw(backbone, batch, gen())
    if not w_px and not w_pyx:
        with pytest.raises(ConfigError, match="nothing to learn"):
            objective.loss(backbone, batch, draws)
        return
    terms = objective.loss(backbone, batch, draws)
    expected = w_pyx * F.cross_entropy(backbone.model(batch.x).logits, batch.y)
    if w_px:
        pos, neg = backbone.model(batch.x_pos).energy, backbone.model(draws.x_neg).energy
        expected = expected + w_px * (pos.mean() - neg.mean())
        assert len(draws.x_neg) == 4
    else:
        assert draws.x_neg is None
        assert torch.equal(backbone.density.buffer.states, before)
    torch.testing.assert_close(terms.total, expected)


def test_conditional_negatives_are_of_the_classes_of_the_data_by_the_joint_energy() -> None:
    backbone = toy_backbone(TASK, linear_model(64, 3), buffer=Buffer(capacity=12, conditional=True))
    batch = toy_batch(TASK, 6, positives=4)
    objective = objective_of("jem", negatives="conditional", w_pyx=0)
    draws = objective.draw(backbone, batch, gen())
    assert torch.equal(draws.y, batch.y[:4])
    model, y = backbone.model, draws.y
    expected = model(batch.x_pos).joint(y).mean() - model(draws.x_neg).joint(y).mean()
    torch.testing.assert_close(objective.loss(backbone, batch, draws).total, expected)


def test_conditional_negatives_need_a_conditional_buffer() -> None:
    objective = objective_of("jem", negatives="conditional")
    with pytest.raises(MisfitError, match="conditional"):
        objective.draw(toy_backbone(TASK), toy_batch(TASK), gen())


def test_pgdat_is_the_cross_entropy_of_what_the_attack_gives() -> None:
    backbone, batch = backbone_of("classifier"), toy_batch(TASK)
    objective = objective_of("pgdat")
    x_adv = objective.draw(backbone, batch, gen())
    terms = objective.loss(backbone, batch, x_adv)
    expected = F.cross_entropy(backbone.model(x_adv).logits, batch.y)
    torch.testing.assert_close(terms.total, expected)
    limit = TASK.bounds.px(TASK.radius_px)
    assert 0 < float((x_adv - batch.x).abs().max()) <= limit + 1e-6


def test_trades_is_the_cross_entropy_and_beta_times_the_divergence() -> None:
    backbone = Backbone(linear_model(64, 3), radius_px=8)
    batch = toy_batch(TASK)
    objective = objective_of("trades", beta=2.5)
    x_adv = objective.draw(backbone, batch, gen())
    clean, adv = backbone.model(batch.x).logits, backbone.model(x_adv).logits
    p, q = clean.softmax(1), adv.softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    expected = F.cross_entropy(clean, batch.y) + 2.5 * divergence
    terms = objective.loss(backbone, batch, x_adv)
    torch.testing.assert_close(terms.total, expected, rtol=1e-4, atol=1e-5)
    assert divergence > 0


def test_trades_without_its_divergence_runs_no_attack() -> None:
    backbone, batch = backbone_of("classifier"), toy_batch(TASK)
    recorded, objective = passes(backbone.model), objective_of("trades", beta=0)
    assert objective.draw(backbone, batch, gen()) is None
    assert not recorded
    assert list(objective.loss(backbone, batch, None).parts) == ["p(y|x)"]


@pytest.mark.parametrize(("options", "drawing", "losing"), [
    ({}, 2 + 2, [4 + 4 + 6 + 6]),  # SGLD and M_adv steps; one joint pass of all four streams
    ({"w1": 0}, 2, [6 + 6]),
    ({"w2": 0, "w3": 0, "w_clean": 1}, 2, [6 + 4 + 4]),
    ({"w1": 0, "w2": 0, "w3": 0, "w_clean": 1}, 0, [6]),
    ({"w1": 0, "w2": 0, "w_clean": 0}, 2, [6]),
    ({"w2": 0, "w3": 0, "w_clean": 0}, 2, [4 + 4]),
    ({"w1": 0, "w3": 0}, 2, [6 + 6]),
])  # fmt: skip
def test_a_term_of_weight_zero_is_neither_drawn_nor_computed(
    options: dict[str, float], drawing: int, losing: list[int]
) -> None:
    backbone, batch = toy_backbone(TASK, linear_model(64, 3)), toy_batch(TASK, 6, positives=4)
    objective = objective_of("ebjdat", **options)
    # a chain's step goes through the whole network once
    recorded = passes(backbone.model)
    draws = objective.draw(backbone, batch, gen())
    assert len(recorded) == drawing
    recorded.clear()
    terms = objective.loss(backbone, batch, draws)
    assert recorded == losing
    assert all(weight for weight, _ in terms.parts.values())


def test_with_batch_norm_each_stream_has_a_pass_and_statistics_of_its_own() -> None:
    backbone, batch = toy_backbone(TASK), toy_batch(TASK, 6, positives=4)
    backbone.model.train()
    recorded = passes(backbone.model)
    norm = backbone.model.network.norm1
    streams = {"x": batch.x, "x_pos": batch.x_pos, "x_neg": 3 * batch.x_pos, "x_adv": batch.x}
    scores = backbone.scores(streams)
    assert recorded == [6, 4, 4, 6]
    assert int(norm.num_batches_tracked) == 2  # x and x_adv, the classifier's streams
    alone = backbone.model(batch.x_pos)
    torch.testing.assert_close(scores["x_pos"].energy, alone.energy)


def test_trades_climbs_the_divergence_or_as_agr_trades_the_cross_entropy() -> None:
    backbone, batch, attack = backbone_of("classifier"), toy_batch(TASK), PGD(steps=3)
    of_kl = kl_adversary(attack, backbone, batch.x, gen())
    of_ce = ce_adversary(attack, backbone, batch.x, batch.y, gen())
    assert not torch.equal(of_kl, of_ce)
    for climbs, wanted in (("kl", of_kl), ("ce", of_ce)):
        objective = objective_of("trades", climbs=climbs, attack=attack)
        assert torch.equal(objective.draw(backbone, batch, gen()), wanted)


def test_without_batch_norm_one_joint_pass_is_every_stream_alone() -> None:
    backbone, batch = toy_backbone(TASK, linear_model(64, 3)), toy_batch(TASK)
    recorded = passes(backbone.model)
    scores = backbone.scores({"x": batch.x, "x_neg": -batch.x[:2]})
    assert recorded == [8]
    torch.testing.assert_close(scores["x"].logits, backbone.model(batch.x).logits)
    torch.testing.assert_close(scores["x_neg"].energy, backbone.model(-batch.x[:2]).energy)


def test_a_classifier_has_no_density_and_says_so() -> None:
    with pytest.raises(MisfitError, match="no density"):
        _ = backbone_of("classifier").density


def test_ebjdat_trains_a_plain_torch_model_in_a_loop_of_ones_own() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    backbone = Backbone.of_module(model, shape=TASK.shape, n_classes=3, rng=gen(), steps=2)
    objective = objective_of("ebjdat")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch: Batch = toy_batch(TASK, 24)
    losses = []
    for step in range(20):
        terms = objective.loss(backbone, batch, objective.draw(backbone, batch, gen(step)))
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        losses.append(float(F.cross_entropy(model(batch.x), batch.y).detach()))
    assert losses[-1] < 0.8 * losses[0]


@given(k=st.sampled_from([3, 100]))
def test_nothing_hard_codes_the_number_of_classes(k: int) -> None:
    task = toy_task(n_classes=k, n_train=2 * k)
    batch = toy_batch(task, 6)
    for name in OBJECTIVES:
        backbone = backbone_for(name, "sadajem", task=task)
        objective = objective_of(name, task)
        terms = objective.loss(backbone, batch, objective.draw(backbone, batch, gen()))
        assert terms.total.isfinite()
