"""EB-JDAT is Algorithm 1: its chain, its terms, and every form of them."""

import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, radii_px, seeds, uniform
from torch import Tensor
from toys import backbone_of, gen, linear_model, objective_of, updater_of

from jemkit import (
    MALA,
    Ascent,
    Backbone,
    Batch,
    EnergyModel,
    Guard,
    Images,
    L2Ascent,
    SGLDAscent,
    SignAscent,
    train_step,
)
from jemkit.models.distances import L2
from jemkit.models.networks import MLP
from jemkit.runtime.pytree import same
from jemkit.testing import toy_backbone, toy_batch, toy_model, toy_task
from jemkit.testing.law import state_of
from jemkit_plugins import ebjdat
from jemkit_plugins.ebjdat import EBJDAT, Draws

TASK = toy_task()
OUTER = ["align", "contrastive", "squared"]
ASCENTS = [SignAscent(step_px=0.05), L2Ascent(step_px=0.1), SGLDAscent(step_size=0.001)]


@cache
def half_trained() -> EnergyModel:
    """A perceptron after thirty steps of standard training."""
    model = toy_model(TASK, MLP(hidden=32, layers=1)).train()
    batch = toy_batch(TASK, 24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(batch.x).logits, batch.y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def trained(**settings: float) -> Backbone:
    return Backbone(half_trained(), radius_px=settings.get("radius_px", 8.0))


def loss_of(model: EnergyModel, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(x).logits, y))


def adversary(objective: EBJDAT, backbone: Backbone, batch: Batch, seed: int = 0) -> Tensor:
    """x~ alone: without h1 no negatives are drawn."""
    x_adv = objective.model_copy(update={"w1": 0.0}).draw(backbone, batch, gen(seed)).x_adv
    assert x_adv is not None
    return x_adv


def states(objective: EBJDAT, backbone: Backbone, batch: Batch) -> list[Tensor]:
    """Every state of the chain, from its start."""
    steps = range(objective.adv_steps + 1)
    shorter = (objective.model_copy(update={"adv_steps": n}) for n in steps)
    return [adversary(each, backbone, batch) for each in shorter]


class TestChain:
    @pytest.mark.parametrize("ascent", ASCENTS)
    @pytest.mark.parametrize("inner", ["joint", "marginal", "ce"])
    def test_what_the_chain_climbs_never_falls(self, ascent: Ascent, inner: str) -> None:
        objective = objective_of("ebjdat", ascent=ascent, adv_steps=6, inner=inner)
        backbone, batch = trained(radius_px=255), toy_batch(TASK, 12)
        batch = batch._replace(x=0.2 * batch.x)  # neither the ball nor the range stops it
        with torch.no_grad():
            climbed = [
                climb(inner, backbone.model, x, batch.y) for x in states(objective, backbone, batch)
            ]
        rises = torch.stack(climbed).diff(dim=0)
        assert (rises >= -2e-6).all()
        assert float(rises.sum()) > 0

    def test_the_default_makes_images_harder(self) -> None:
        backbone, batch = trained(), toy_batch(TASK, 24)
        clean = loss_of(backbone.model, batch.x, batch.y)
        harder = adversary(objective_of("ebjdat", adv_steps=5), backbone, batch)
        assert loss_of(backbone.model, harder, batch.y) > 1.2 * clean

    @given(seed=seeds, n=st.integers(1, 5), steps=st.integers(0, 2))
    def test_no_radius_gives_x_itself(self, seed: int, n: int, steps: int) -> None:
        x = uniform(seed, n, *TASK.shape)
        batch = Batch(x, torch.arange(n) % 3, x, torch.arange(n))
        objective = objective_of("ebjdat", radius_px=0, adv_steps=steps)
        x_adv = adversary(objective, trained(), batch, seed)
        assert torch.equal(x_adv, x)
        assert not x_adv.requires_grad

    @given(
        seed=seeds,
        radius=radii_px,
        step_px=st.floats(0, 20),
        norm=st.sampled_from(["Linf", "L2"]),
        ascent=st.sampled_from([SignAscent, L2Ascent, SGLDAscent]),
    )
    def test_every_state_is_in_the_ball_of_the_radius_in_pixels(
        self, seed: int, radius: float, step_px: float, norm: str, ascent: type[Any]
    ) -> None:
        sized = ascent(step_size=step_px) if ascent is SGLDAscent else ascent(step_px=step_px)
        x = uniform(seed, 4, *TASK.shape)
        batch = Batch(x, torch.tensor([0, 1, 2, 0]), x, torch.arange(4))
        order = 2.0 if norm == "L2" else math.inf
        for steps in (0, 1, 2):
            objective = objective_of(
                "ebjdat", radius_px=radius, adv_steps=steps, norm=norm, ascent=sized
            )
            x_adv = adversary(objective, trained(), batch, seed)
            size = (x_adv - x).flatten(1).norm(order, dim=1)
            assert (size <= 2 * radius / 255 * (1 + 1e-4) + 1e-6).all()
            assert x_adv.abs().max() <= 1

    def test_the_radius_defaults_to_the_tasks_in_pixels(self) -> None:
        batch = Batch(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), torch.zeros(0), torch.zeros(0))
        backbone = Backbone(linear_model(64, 3), radius_px=10)
        reach = adversary(objective_of("ebjdat", adv_steps=9), backbone, batch).abs().max()
        assert math.isclose(float(reach), 20 / 255, rel_tol=1e-5)

    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    def test_odd_and_single_batches_give_what_one_batch_gives(self, size: int) -> None:
        objective, backbone = objective_of("ebjdat", adv_steps=3), backbone_of("sadajem")
        whole = toy_batch(TASK, 5)

        def chained(batch: Batch) -> Tensor:
            with pytest.MonkeyPatch.context() as patch:  # one start for all sizes
                patch.setattr(ebjdat, "perturbed", lambda x, *_: x)
                return adversary(objective, backbone, batch)

        parts = [chained(rows(whole, slice(i, i + size))) for i in range(0, 5, size)]
        torch.testing.assert_close(torch.cat(parts), chained(whole), rtol=0, atol=1e-5)

    def test_an_image_is_attacked_by_itself_though_the_network_has_batch_norm(self) -> None:
        objective = objective_of("ebjdat", adv_steps=3)
        backbone, batch = backbone_of("sadajem"), toy_batch(TASK, 4)
        assert backbone.model.training
        other = batch._replace(x=torch.cat([batch.x[:1], -batch.x[1:]]))
        one, two = (adversary(objective, backbone, b) for b in (batch, other))
        torch.testing.assert_close(one[0], two[0], rtol=0, atol=1e-6)
        assert not torch.equal(one[1], two[1])

    def test_it_leaves_the_model_the_batch_and_a_leaf_alone(self) -> None:
        backbone, batch = backbone_of("sadajem"), toy_batch(TASK)
        leaf = batch.x.clone().requires_grad_()
        first = next(backbone.model.parameters())
        first.grad = torch.ones_like(first)
        before = state_of(backbone.model)
        objective_of("ebjdat").draw(backbone, batch._replace(x=leaf), gen())
        assert same(state_of(backbone.model), before)
        assert torch.equal(leaf.detach(), batch.x)
        assert leaf.grad is None

    def test_a_distance_with_a_positive_weight_keeps_images_nearer_and_a_negative_farther(
        self,
    ) -> None:
        backbone, batch = trained(radius_px=60), toy_batch(TASK, 12)
        far = L2().bind(backbone.model, batch.x, backbone.bounds)
        sizes = []
        for weight in (300.0, 0.0, -300.0):
            objective = objective_of(
                "ebjdat", ascent=SGLDAscent(step_size=0.05), distance=L2(), distance_weight=weight,
                adv_steps=8,
            )  # fmt: skip
            sizes.append(float(far(adversary(objective, backbone, batch)).mean()))
        assert sizes[0] < sizes[1] < sizes[2]

    def test_a_distance_of_weight_0_is_not_computed(self) -> None:
        class Untouchable(L2):
            def bind(self, *_: Any) -> Any:
                raise AssertionError

        objective = objective_of("ebjdat", distance=Untouchable(), distance_weight=0)
        adversary(objective, trained(), toy_batch(TASK, 2))

    @given(seed=seeds, weight=st.floats(0, 3))
    def test_a_step_of_sgld_is_eq_12(self, seed: int, weight: float) -> None:
        model = linear_model(64, 3, seed)
        x, y = uniform(seed, 4, *TASK.shape, low=-0.3, high=0.3), torch.tensor([0, 1, 2, 0])
        batch = Batch(x, y, x, torch.arange(4))
        objective = objective_of(
            "ebjdat", ascent=SGLDAscent(step_size=0.02), radius_px=120, distance=L2(),
            distance_weight=weight, adv_steps=1,
        )  # fmt: skip
        start, end = states(objective, Backbone(model), batch)
        # d log p(x~, y) / dx~ = w_y; the distance, half a mean square, pulls back to x
        slope = model.head.weight[y] + weight * (start - x).flatten(1) / 64
        expected = (start.flatten(1) - 0.02 * slope).clamp(-1, 1)
        delta = (expected - x.flatten(1)).clamp(-240 / 255, 240 / 255)
        torch.testing.assert_close(end.flatten(1), x.flatten(1) + delta, rtol=1e-4, atol=1e-5)


def rows(batch: Batch, part: slice) -> Batch:
    return Batch(batch.x[part], batch.y[part], batch.x_pos[part], batch.index[part])


def climb(inner: str, model: EnergyModel, x: Tensor, y: Tensor) -> Tensor:
    """By hand from the logits, [B]."""
    f = model(x).logits
    joint, marginal = -f.gather(1, y[:, None]).squeeze(1), -f.logsumexp(1)
    return {"joint": joint, "marginal": marginal, "ce": joint - marginal}[inner]


def drawn(seed: int = 0) -> tuple[Backbone, Batch, Draws]:
    """A linear model of double-checked formulas, with draws that no chain made."""
    backbone = toy_backbone(TASK, linear_model(64, 3, seed))
    batch = toy_batch(TASK, 6, positives=4)
    x_adv = batch.x + 0.1 * normal(seed, *batch.x.shape)
    return backbone, batch, Draws(uniform(seed + 1, 4, *TASK.shape), x_adv)


def terms_by_hand(backbone: Backbone, batch: Batch, draws: Draws) -> dict[str, Tensor]:
    model = backbone.model
    clean, adv = model(batch.x), model(draws.x_adv)
    return {
        "p(x)": model(batch.x_pos).energy.mean() - model(draws.x_neg).energy.mean(),
        "p(x~|x)": adv.energy.mean() - clean.energy.mean(),
        "p(y|x~)": F.cross_entropy(adv.logits, batch.y),
        "p(y|x)": F.cross_entropy(clean.logits, batch.y),
    }


class TestLoss:
    @given(seed=seeds, w=st.tuples(*[st.floats(0.01, 2)] * 4))
    def test_the_total_is_the_weighted_sum_of_the_terms_of_algorithm_1(
        self, seed: int, w: tuple[float, ...]
    ) -> None:
        backbone, batch, draws = drawn(seed % 1000)
        objective = objective_of("ebjdat", w1=w[0], w2=w[1], w3=w[2], w_clean=w[3])
        terms = objective.loss(backbone, batch, draws)
        by_hand = terms_by_hand(backbone, batch, draws)
        assert list(terms.parts) == list(by_hand)
        for (name, (weight, term)), expected in zip(terms.parts.items(), w, strict=True):
            assert weight == expected
            torch.testing.assert_close(term, by_hand[name], rtol=1e-4, atol=1e-5)
        total = sum(a * b for a, b in zip(w, by_hand.values(), strict=True))
        torch.testing.assert_close(terms.total, total, rtol=1e-4, atol=1e-4)

    def test_the_defaults_are_the_papers(self) -> None:
        objective = EBJDAT()
        assert (objective.w1, objective.w2, objective.w3) == (0.45, 0.05, 0.45)
        assert objective.clean == objective.w3
        assert (objective.adv_steps, objective.outer, objective.inner) == (5, "align", "joint")
        assert (objective.ascent, objective.norm) == (SignAscent(), "Linf")

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_h2_has_the_form_that_its_option_names_of_each_image_and_its_own(
        self, seed: int
    ) -> None:
        backbone, batch, draws = drawn(seed)
        assert draws.x_adv is not None
        gap = backbone.model(draws.x_adv).energy - backbone.model(batch.x).energy
        forms = {"align": gap.mean(), "contrastive": -gap.mean(), "squared": (gap**2).mean()}
        for outer, expected in forms.items():
            objective = objective_of("ebjdat", outer=outer, w1=0, w3=0)
            terms = objective.loss(backbone, batch, draws).parts["p(x~|x)"][1]
            torch.testing.assert_close(terms, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("outer", "sign"), [("align", 1), ("contrastive", -1)])
    def test_a_small_step_on_h2_moves_the_gap_the_way_of_its_reading(
        self, outer: str, sign: int
    ) -> None:
        backbone, batch, draws = drawn()
        objective = objective_of("ebjdat", outer=outer, w1=0, w3=0)

        def gap() -> Tensor:
            scores = backbone.model(draws.x_adv), backbone.model(batch.x)
            return (scores[0].energy - scores[1].energy).mean()

        before = float(gap().detach())
        objective.loss(backbone, batch, draws).total.backward()
        with torch.no_grad():
            for p in backbone.model.parameters():
                p -= 1e-3 * p.grad
        assert sign * (float(gap().detach()) - before) < 0

    @given(c=st.floats(-5, 5), outer=st.sampled_from(OUTER))
    def test_the_loss_ignores_a_constant_added_to_every_logit(self, c: float, outer: str) -> None:
        backbone, batch, draws = drawn()
        objective = objective_of("ebjdat", outer=outer)
        before = objective.loss(backbone, batch, draws).total
        with torch.no_grad():
            backbone.model.head.bias.add_(c)
        after = objective.loss(backbone, batch, draws).total
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)

    def test_h1_takes_the_densitys_view_and_h2_the_classifiers(self) -> None:
        backbone, batch, draws = drawn()
        other = batch._replace(x_pos=0.5 * batch.x_pos)
        objective = objective_of("ebjdat")
        one, two = (objective.loss(backbone, b, draws).parts for b in (batch, other))
        assert not torch.equal(one["p(x)"][1], two["p(x)"][1])
        torch.testing.assert_close(one["p(x~|x)"][1], two["p(x~|x)"][1])

    def test_swapping_data_and_negatives_turns_the_sign_of_h1(self) -> None:
        backbone, batch, draws = drawn()
        objective = objective_of("ebjdat", w2=0, w3=0, w_clean=0)
        swapped = batch._replace(x_pos=draws.x_neg), Draws(batch.x_pos, None)
        one = objective.loss(backbone, batch, Draws(draws.x_neg, None)).total
        torch.testing.assert_close(objective.loss(backbone, *swapped).total, -one)

    def test_both_cross_entropies_are_reported_apart(self) -> None:
        backbone, batch, draws = drawn()
        terms = objective_of("ebjdat").loss(backbone, batch, draws)
        assert {"p(y|x~)", "p(y|x)"} <= set(terms.parts)
        assert {"E(x)", "E(x+)", "E(x-)", "E(x~)", "accuracy", "accuracy(x~)"} == set(terms.watched)
        torch.testing.assert_close(
            terms.watched["E(x-)"], backbone.model(draws.x_neg).energy.mean().detach()
        )

    @pytest.mark.parametrize("name", ["jem", "jempp", "mebm", "sadajem"])
    def test_draws_carry_no_graph_and_as_many_images_as_their_streams(self, name: str) -> None:
        backbone, batch = backbone_of(name), toy_batch(TASK, 6, positives=4)
        draws = objective_of("ebjdat").draw(backbone, batch, gen())
        assert (len(draws.x_neg), len(draws.x_adv)) == (4, 6)
        assert not draws.x_neg.requires_grad
        assert not draws.x_adv.requires_grad

    def test_the_penalty_of_the_density_comes_along_with_h1(self) -> None:
        backbone, batch = backbone_of("mebm"), toy_batch(TASK)
        objective = objective_of("ebjdat", w2=0, w3=0, w_clean=0)
        draws = objective.draw(backbone, batch, gen())
        backbone.model.eval()
        pos = backbone.model(batch.x_pos).energy
        neg = backbone.model(draws.x_neg).energy
        expected = pos.mean() - neg.mean() + 0.5 * (pos.square().mean() + neg.mean().square())
        torch.testing.assert_close(
            objective.loss(backbone, batch, draws).parts["p(x)"][1], expected
        )


def test_one_image_and_many_classes_train_too() -> None:
    task = toy_task(n_classes=100, n_train=200)
    images = task.images("train")
    x = task.bounds.from_unit(Images(images.x[:1], images.y[:1]).unit())
    batch = Batch(x, images.y[:1], x, torch.arange(1))
    backbone = backbone_of("jempp", task)
    objective = objective_of("ebjdat")
    terms = objective.loss(backbone, batch, objective.draw(backbone, batch, gen()))
    assert terms.total.isfinite()


def test_what_the_ascent_reports_stands_beside_the_samplers() -> None:
    class Accepted(SignAscent):
        def kernel(self, *_: Any) -> MALA:
            return MALA(step_size=1e-4)

    backbone = toy_backbone(TASK, sampler=MALA())
    updater = updater_of("plain", backbone.model)
    chosen, batch = EBJDAT(ascent=Accepted()), toy_batch(TASK)
    recorded = train_step(backbone, chosen, updater, batch, gen(), Guard()).watched
    assert recorded["ascent/acceptance"] != recorded["sampler/acceptance"]
