"""DUCAT: folding, targets and the loss worked by hand; dummies begin late, and are folded away."""

from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logits import batch_of, logits
from strategies import labels, normal, seeds
from torch import Tensor
from toys import REGISTRY, Flat, backbone_for, backbone_of, gen, objective_of, tiny

from jemkit import (
    Backbone,
    Context,
    MisfitError,
    PixelModel,
    Threat,
    Unmeasurable,
    ce_adversary,
    check,
    resolve,
)  # fmt: skip
from jemkit.metrics.evaluator import measure
from jemkit.testing import toy_batch, toy_task
from jemkit_plugins.ducat import (
    DUCAT,
    DUCATObjective,
    DummyEnergy,
    Fold,
    Foldings,
    folded,
    read_as,
    target,
)  # fmt: skip
from jemkit_plugins.ducat.terms import disagreement, margin

TASK = toy_task()
CLEAN, ADV = logits((0.4, 0.2, 0.3, 0.1)), logits((0.1, 0.3, 0.4, 0.2))  # 0, 1, and their dummies


def identity(fold: Fold = "lse") -> Backbone:
    """Two classes and their dummies; the 2K logits are the image."""
    model = DummyEnergy(Flat(4), 2, fold)
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(4))
        model.head.bias.zero_()
    return Backbone(model)


def parts(step: int, clean: Tensor = CLEAN, **options: Any) -> dict[str, tuple[float, float]]:
    objective = DUCATObjective(DUCAT(**options), total_steps=10)
    batch = batch_of(clean, 0)._replace(step=step)
    terms = objective.loss(identity(), batch, ADV)
    return {name: (w, float(term.detach())) for name, (w, term) in terms.parts.items()}


def test_folding_by_hand() -> None:
    p = folded(CLEAN).softmax(1)
    torch.testing.assert_close(p, torch.tensor([[0.7, 0.3]]))  # probabilities add up
    largest = folded(CLEAN, "max").exp()
    torch.testing.assert_close(largest, torch.tensor([[0.4, 0.2]]))


def test_an_odd_number_of_logits_is_refused() -> None:
    with pytest.raises(MisfitError, match="5 logits cannot be folded: expected an even number"):
        folded(torch.zeros(3, 5))


@pytest.mark.parametrize("fold", ["lse", "max"])
def test_what_is_judged_are_k_folded_logits_and_the_energy_is_of_all(fold: Fold) -> None:
    x = 3 * torch.randn(8, 4, generator=gen())
    scores = identity(fold).model(x)
    torch.testing.assert_close(scores.logits, folded(x, fold))
    torch.testing.assert_close(scores.energy, -x.logsumexp(1))
    of_folded = -scores.logits.logsumexp(1)
    assert torch.allclose(of_folded, scores.energy) == (fold == "lse")


def test_targets_by_hand() -> None:
    y = torch.tensor([0, 1])
    wanted = [[0.75, 0, 0.25, 0], [0, 0.75, 0, 0.25]]
    torch.testing.assert_close(target(torch.zeros(2, 4), y, 0.25), torch.tensor(wanted))
    whole = target(torch.zeros(2, 4), y, 1.0)
    torch.testing.assert_close(whole, torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 1]]))


def test_until_the_dummies_begin_it_is_the_cross_entropy_among_2k_classes() -> None:
    assert parts(7) == {"p(y|x~)": (1.0, pytest.approx(-log(0.1), rel=1e-5))}
    assert parts(9, start=1) == parts(7)


def test_the_loss_with_dummies_worked_by_hand() -> None:
    result = parts(8)
    assert result["p(y|x)"] == (0.5, pytest.approx(-0.75 * log(0.4) - 0.25 * log(0.3), rel=1e-5))
    assert result["p(y|x~)"] == (0.5, pytest.approx(-log(0.4), rel=1e-5))  # its dummy alone
    assert parts(8, adv_mass=0.5)["p(y|x~)"][1] == pytest.approx(-0.5 * log(0.4), rel=1e-5)
    half = -0.5 * (log(0.1) + log(0.4))
    assert parts(8, adv_dummy=0.5)["p(y|x~)"][1] == pytest.approx(half, rel=1e-5)


KL = sum(p * log(p / q) for p, q in zip((0.4, 0.2, 0.3, 0.1), (0.1, 0.3, 0.4, 0.2), strict=True))
"""Over all 2K classes."""


def test_the_variant_of_trades_worked_by_hand() -> None:
    early, late = (parts(step, variant="trades", beta=5.0) for step in (7, 8))
    assert early == {
        "p(y|x)": (1.0, pytest.approx(-log(0.4), rel=1e-5)),
        "KL": (5.0, pytest.approx(KL, rel=1e-5)),
    }
    assert {**late, "KL": None} == {**parts(8), "KL": None}
    assert late["KL"] == early["KL"]
    assert "KL" not in parts(8, variant="trades", beta=0.0)


def test_the_variant_of_mart_worked_by_hand() -> None:
    early, late = (parts(step, variant="mart") for step in (7, 8))
    others = {
        "margin": (1.0, pytest.approx(-log(1.0001 - 0.4), rel=1e-5)),  # its dummy is the likeliest
        "KL": (6.0, pytest.approx(0.6 * KL, rel=1e-5)),
    }
    assert early == {"p(y|x~)": (1.0, pytest.approx(-log(0.1), rel=1e-5)), **others}
    assert late == {**{k: (w, pytest.approx(t)) for k, (w, t) in parts(8).items()}, **others}


def test_the_variant_of_consistency_worked_by_hand() -> None:
    p, q = (0.4, 0.2, 0.3, 0.1), (0.1, 0.3, 0.4, 0.2)
    sharp = [[v**2 / sum(w**2 for w in row) for v in row] for row in (p, q)]  # a temperature of 0.5
    middle = [(a + b) / 2 for a, b in zip(*sharp, strict=True)]
    jsd = sum(a * log(a / m) for row in sharp for a, m in zip(row, middle, strict=True)) / 2
    torch.testing.assert_close(disagreement(torch.cat([CLEAN, ADV]), 0.5), torch.tensor(jsd))

    def of(step: int, **options: Any) -> dict[str, tuple[float, float]]:
        objective = DUCATObjective(DUCAT(variant="consistency", **options), total_steps=10)
        batch = batch_of(CLEAN, 0)._replace(step=step, x_pos=ADV)  # two views of one image
        terms = objective.loss(identity(), batch, torch.cat([CLEAN, ADV]))
        return {name: (w, float(term.detach())) for name, (w, term) in terms.parts.items()}

    divergence = (1.0, pytest.approx(jsd, rel=1e-5))
    ce = -(log(0.4) + log(0.1)) / 2
    assert of(7) == {"p(y|x~)": (1.0, pytest.approx(ce, rel=1e-5)), "JSD": divergence}
    clean = -(0.75 * (log(0.4) + log(0.1)) + 0.25 * (log(0.3) + log(0.4))) / 2
    assert of(8) == {
        "p(y|x)": (0.5, pytest.approx(clean, rel=1e-5)),
        "p(y|x~)": (0.5, pytest.approx(-(log(0.3) + log(0.4)) / 2, rel=1e-5)),
        "JSD": divergence,
    }
    assert of(7, consistency=3.0)["JSD"] == (3.0, divergence[1])
    assert list(of(7, consistency=0.0)) == ["p(y|x~)"]


@given(seed=seeds, temperature=st.floats(0.1, 9), scale=st.sampled_from([0.1, 1.0, 50.0]))
def test_views_disagree_by_at_most_log_2_in_either_order_and_by_nothing_if_equal(
    seed: int, temperature: float, scale: float
) -> None:
    one, other = normal(seed, 5, 4, scale=scale), normal(seed + 1, 5, 4, scale=scale)
    value = float(disagreement(torch.cat([one, other]), temperature))
    assert -1e-5 <= value <= log(2) + 1e-5
    swapped = float(disagreement(torch.cat([other, one]), temperature))
    assert value == pytest.approx(swapped, abs=1e-5)
    assert float(disagreement(torch.cat([one, one]), temperature)) == pytest.approx(0, abs=1e-5)


def test_for_consistency_both_views_of_every_image_are_attacked() -> None:
    backbone, batch = backbone_for("ducat", "classifier"), toy_batch(TASK)
    objective = objective_of("ducat", variant="consistency")
    check(backbone, objective)
    x_adv = objective.draw(backbone, batch, gen())
    limit = TASK.bounds.px(TASK.radius_px) + 1e-6
    for view, attacked in zip((batch.x, batch.x_pos), x_adv.chunk(2), strict=True):
        assert 0 < float((attacked - view).abs().max()) <= limit
    assert objective.loss(backbone, batch, x_adv).total.isfinite()
    with pytest.raises(MisfitError, match=r"views.pos_share is 0.5: set it to 1"):
        check(backbone_for("ducat", "sadajem"), objective)
    check(backbone_for("ducat", "sadajem"), objective_of("ducat"))


@given(seed=seeds)
def test_mart_s_margin_is_finite_and_smallest_where_y_has_all(seed: int) -> None:
    raw, y = normal(seed, 6, 4, scale=20.0), labels(seed, 6, 2)
    sure = torch.full((6, 4), -40.0).scatter(1, y[:, None], 40.0)
    assert bool(margin(raw, y).isfinite())
    assert float(margin(sure, y)) <= float(margin(raw, y))


def test_its_mean_is_over_clean_and_adversarial_images_together() -> None:
    result = parts(8, clean=ADV, clean_dummy=1.0)
    assert result["p(y|x)"] == result["p(y|x~)"]
    assert sum(weight for weight, _ in result.values()) == 1


def test_a_model_without_dummies_is_refused_with_what_to_set() -> None:
    with pytest.raises(MisfitError, match=r'backbone.energy.use = "dummies"'):
        check(backbone_of("classifier", TASK), objective_of("ducat"))
    check(backbone_for("ducat", "classifier"), objective_of("ducat"))


def test_its_recipe_brings_the_dummies_to_every_backbone() -> None:
    for backbone in ("classifier", "sadajem", "mebm"):
        named = {"backbone": {"use": backbone}, "objective": {"use": "ducat"}}
        assert resolve(REGISTRY, named=named).tables["backbone"]["energy"]["use"] == "dummies"


def test_its_attack_is_on_2k_logits_and_leaves_the_folding_as_it_was() -> None:
    backbone, batch = backbone_for("ducat", "classifier"), toy_batch(TASK)
    objective: Any = objective_of("ducat")
    x_adv = objective.draw(backbone, batch, gen())
    of_folded = ce_adversary(objective.options.attack, backbone, batch.x, batch.y, gen())
    with read_as(backbone.model, "none"):
        of_all = ce_adversary(objective.options.attack, backbone, batch.x, batch.y, gen())
        assert backbone.model(batch.x).logits.shape == (6, 6)
    assert torch.equal(x_adv, of_all)
    assert not torch.equal(x_adv, of_folded)
    assert backbone.model(x_adv).logits.shape == (6, 3)
    with pytest.raises(RuntimeError), read_as(backbone.model, "max"):
        raise RuntimeError
    assert backbone.model.fold == "lse"


def context() -> Context:
    return Context(gen(), Threat("Linf", 25.5), batch_size=7)


def test_accuracy_is_reported_through_both_foldings_and_on_2k_logits() -> None:
    backbone = backbone_for("ducat", "classifier")
    subject, data = PixelModel(backbone.model, TASK.bounds), TASK.images("valid")
    once, again = (measure(subject, data, [Foldings(steps=2)], context()) for _ in range(2))
    assert [f.name for f in once] == ["pgd2_lse", "pgd2_max", "pgd2_none"]
    assert [f.value for f in once] == [f.value for f in again]
    assert [f.protocol["folded"] for f in once] == ["lse", "max", "max"]
    plain = PixelModel(backbone_of("classifier").model, TASK.bounds)
    with pytest.raises(Unmeasurable, match="no dummy classes"):
        measure(plain, data, [Foldings()], context())
    in_l1 = replace(context(), threat=Threat("L1", 255.0))
    with pytest.raises(Unmeasurable, match="does not support L1"):
        measure(subject, data, [Foldings()], in_l1)


def test_an_attack_on_2k_logits_takes_the_dummy_of_the_true_class_for_a_success() -> None:
    """One pixel moves mass from class 0 to its dummy, another, more weakly, to class 1."""
    model = DummyEnergy(Flat(2), 2, "lse")
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[-9.0, -1.0], [0.0, 1.0], [9.0, -1.0], [-9.0, -9.0]]))
        model.head.bias.zero_()
    x = torch.tensor([[0.0, 0.0]], requires_grad=True)
    slopes = {}
    for fold in ("none", "lse"):
        with read_as(model, fold):
            loss = torch.nn.functional.cross_entropy(model(x).logits, torch.tensor([0]))
        slopes[fold] = torch.autograd.grad(loss, x)[0][0]
    assert slopes["none"][0] > 2 * slopes["none"][1].abs()  # up the pixel that raises the dummy
    assert slopes["lse"][0] < slopes["none"][0] / 2
    moved = folded(model.head(torch.tensor([[0.5, 0.0]])))
    assert moved.argmax(1).item() == 0  # where folding gives the true class back
    assert moved.softmax(1)[0, 0] > 1 - exp(-3)


def test_options_without_effect_are_named() -> None:
    assert set(tiny("objective", "ducat", start=1).unused()) == {
        "clean_dummy", "adv_dummy", "adv_mass", "beta", "consistency", "temperature",
    }  # fmt: skip
    assert set(DUCAT().unused()) == {"beta", "consistency", "temperature"}
    assert set(DUCAT(variant="mart").unused()) == {"consistency", "temperature"}
    assert set(DUCAT(variant="consistency").unused()) == {"beta"}
    assert set(DUCAT(variant="consistency", consistency=0).unused()) == {"beta", "temperature"}
