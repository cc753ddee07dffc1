"""LAS-AT: attacks image by image, the reward and REINFORCE worked by hand, and what a run keeps."""

from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from logits import batch_of, identity_backbone, logits
from ranks import every_rank
from states import cut_and_resumed
from strategies import labels, normal, seeds
from torch import nn
from toys import Flat, backbone_of, gen, objective_of, tiny, toy_recipe, toy_registry, updater_of

from jemkit import (
    PGD,
    Backbone,
    Diverged,
    Guard,
    LogSumExpEnergy,
    Options,
    Trainer,
    Updater,
    train_step,
)  # fmt: skip
from jemkit.runtime import distributed
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.testing import toy_batch, toy_task
from jemkit.testing.law import state_of
from jemkit.updaters import PlainUpdater
from jemkit_plugins.awp import AWP
from jemkit_plugins.lasat.attack import adversary, hardness
from jemkit_plugins.lasat.forms import FORMS, Form
from jemkit_plugins.lasat.objective import Draws, LASATObjective, smoothed
from jemkit_plugins.lasat.options import LASAT
from jemkit_plugins.lasat.strategy import Strategy, sampled

TASK = toy_task()
BATCH = toy_batch(TASK)
CLEAN, ADV = logits((0.5, 0.3, 0.2)), logits((0.2, 0.6, 0.2))


def built(**options: Any) -> LASATObjective:
    result: LASATObjective = tiny("objective", "lasat", **options).build(TASK, gen())
    return result


def chosen(n: int, eps: Any = 25.5, iterations: Any = 3, step: Any = 6.0) -> dict[str, Any]:
    given = {"eps_px": eps, "iterations": iterations, "step_px": step}
    return {name: torch.as_tensor(v).float().expand(n) for name, v in given.items()}


def test_with_one_choice_each_it_is_pgd_at_with_smoothed_labels() -> None:
    backbone, batch = backbone_of("classifier", TASK), BATCH._replace(step=1)
    single = built(eps_px=(25.5,), iterations=(3,), step_px=(6.375,))
    x_adv = objective_of("pgdat", attack=PGD(steps=3)).draw(backbone, batch, gen(5))
    draws = single.draw(backbone, batch, gen(5))
    torch.testing.assert_close(draws.x_adv, x_adv, rtol=0, atol=1e-6)
    total = single.loss(backbone, batch, draws).total
    adv = backbone.model(draws.x_adv).logits
    label = torch.full_like(adv, 0.15).scatter(1, batch.y[:, None], 0.7)
    torch.testing.assert_close(total, F.cross_entropy(adv, label))


@given(seed=seeds, steps=st.lists(st.integers(1, 4), min_size=6, max_size=6))
def test_an_image_stands_still_after_its_own_last_step(seed: int, steps: list[int]) -> None:
    backbone = backbone_of("classifier", TASK)

    def after(most: int) -> torch.Tensor:
        attack = chosen(6, iterations=torch.tensor(steps))
        return adversary("at", 25.5, most, backbone, BATCH, attack, gen(seed))

    ended = after(4)
    for i, n in enumerate(steps):
        assert torch.equal(after(n)[i], ended[i])


@given(seed=seeds, eps=st.lists(st.floats(1, 90), min_size=6, max_size=6))
def test_each_image_stays_in_its_own_ball_and_in_the_pixel_range(
    seed: int, eps: list[float]
) -> None:
    backbone, limit = backbone_of("classifier", TASK), torch.tensor(eps).view(-1, 1, 1, 1)
    attack = chosen(6, eps=torch.tensor(eps), step=40.0)
    for form, most in (("at", limit), ("awp", limit.clamp(max=25.5))):
        x_adv = adversary(form, 25.5, 3, backbone, BATCH, attack, gen(seed))
        assert bool(((x_adv - BATCH.x).abs() <= TASK.bounds.px(1.0) * most + 1e-6).all())
        assert float(x_adv.abs().max()) <= 1


def test_the_choices_are_the_authors_and_are_scaled_to_the_radius() -> None:
    sizes = {name: [len(values) for values in form[:4]] for name, form in FORMS.items()}
    assert sizes == {"at": [13, 12, 5, 0], "trades": [5, 8, 3, 5], "awp": [9, 9, 4, 0]}
    assert FORMS["at"].scaled(8.0) == FORMS["at"]
    assert FORMS["at"].scaled(16.0).eps_px == tuple(range(6, 31, 2))
    assert FORMS["at"].scaled(16.0).iterations == FORMS["at"].iterations
    assert built().form.eps_px == FORMS["at"].scaled(TASK.radius_px).eps_px
    assert built(eps_px=(9,)).form.eps_px == (9,)  # what is given is not scaled


# The losses.


@given(seed=seeds, k=st.sampled_from([2, 3, 10]), smoothing=st.floats(0, 0.5))
def test_labels_are_smoothed_over_the_other_classes(seed: int, k: int, smoothing: float) -> None:
    x, y = normal(seed, 5, k), labels(seed, 5, k)
    label = torch.full((5, k), smoothing / (k - 1)).scatter(1, y[:, None], 1 - smoothing)
    torch.testing.assert_close(label.sum(1), torch.ones(5))
    torch.testing.assert_close(smoothed(x, y, smoothing), F.cross_entropy(x, label))


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("at", {"p(y|x~)": -0.7 * log(0.2) - 0.15 * log(0.6) - 0.15 * log(0.2)}),
        ("awp", {"p(y|x~)": -log(0.2)}),
        ("trades", {"p(y|x)": log(2), "KL": 7 * (0.5 * log(0.5 / 0.2) + 0.3 * log(0.3 / 0.6))}),
    ],
)
def test_the_losses_worked_by_hand(form: str, wanted: dict[str, float]) -> None:
    draws = Draws(ADV, {**chosen(1), "beta": torch.tensor([7.0])}, [])
    terms = built(form=form).loss(identity_backbone(3), batch_of(CLEAN, 0), draws)
    assert {n: float(t.detach()) for n, (_, t) in terms.parts.items()} == pytest.approx(wanted)


# The reward.


def rewarded(**options: Any) -> float:
    """Of a linear model whose logits are the pixels, right by a margin of 2 in [-1, 1]."""
    backbone = identity_backbone(3)
    batch = batch_of(2 * torch.eye(3) - 1, 0, 1, 2)._replace(x_pos=torch.zeros(3, 3))
    objective = built(eps_px=(2,), iterations=(1,), step_px=(2,), **options)
    objective.strategy.heads = lambda x: {  # type: ignore[method-assign]
        name: torch.zeros(len(x), 1, requires_grad=True) for name in objective.strategy.choices
    }
    objective.strategy.reinforce = lambda *_: None  # type: ignore[method-assign]
    return float(objective.learn(backbone, batch, gen()))


def test_the_reward_is_the_loss_of_the_images_and_two_accuracies_after_a_step() -> None:
    ce, most = (log(1 + 2 * torch.tensor(-m).exp().item()) for m in (2.0, 2.0 - 4 * 2 / 127.5))
    accuracies = {"at": 4 + 2, "awp": 1 + 1}
    for form, both in accuracies.items():
        assert ce <= rewarded(form=form) - both <= most
    assert rewarded(robust=0.0) == pytest.approx(rewarded() - 4)
    assert rewarded(clean=0.5) == pytest.approx(rewarded() - 1.5)
    # a radius of the whole range turns every image round, so the robust accuracy is 0
    assert rewarded(radius_px=255.0) < 2 + 2


def test_the_loss_in_the_reward_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, objective = backbone_of("classifier", TASK), built()
    with torch.no_grad():
        backbone.model.head.weight.mul_(1e4)
        backbone.model.head.bias.copy_(1e4 * torch.randn(3, generator=gen()))
    monkeypatch.setattr(objective, "form", objective.form._replace(robust=0.0, clean=0.0))
    assert float(objective.learn(backbone, BATCH, gen())) == 10


@pytest.mark.parametrize(("tries", "accuracy"), [((1, 1), 1), ((1, -1), 0), ((-1, 1), 0)])
def test_an_image_is_robust_if_it_withstands_both_restarts(
    tries: tuple[int, int], accuracy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = rewarded(robust=0.0)
    signs = iter(tries)  # the second restart, or the first, turns every image round
    attack = "jemkit_plugins.lasat.reward.ce_adversary"
    monkeypatch.setattr(attack, lambda attack, backbone, x, y, rng: next(signs) * x)
    assert rewarded() - without == pytest.approx(4 * accuracy)


def test_the_loss_in_the_reward_is_that_of_eval_mode() -> None:
    for beta in (None, torch.full((6,), 7.0)):
        backbone = backbone_of("classifier", TASK)
        before = state_of(backbone.model)
        x_adv = (BATCH.x + 0.1).clamp(-1, 1)
        value = hardness(backbone, BATCH, x_adv, beta)
        assert same(state_of(backbone.model), before)
        backbone.model.eval()
        adv, clean = (backbone.model(x).logits.detach() for x in (x_adv, BATCH.x))
        wanted = F.cross_entropy(adv if beta is None else clean, BATCH.y)
        if beta is not None:
            kl = F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
            wanted = wanted + 7 * kl.mean()
        torch.testing.assert_close(value, wanted)


class Watching(Options):
    """Plain updates that record their optimizer's options."""

    recorded: ClassVar[list[dict[str, Any]]] = []

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Updater:
        self.recorded.append(optimizer.defaults)
        return PlainUpdater(optimizer)


def test_the_step_in_the_reward_is_sgd_with_the_papers_weight_decay() -> None:
    objective = built(update=Watching())
    objective.task = replace(TASK, lr=lambda step: 0.07)
    objective.draw(backbone_of("classifier", TASK), BATCH, gen())
    (options,) = Watching.recorded
    given = {name: options[name] for name in ("lr", "momentum", "weight_decay")}
    assert given == {"lr": 0.07, "momentum": 0, "weight_decay": 5e-4}


@pytest.mark.parametrize("form", ["at", "trades", "awp"])
def test_the_reward_leaves_the_model_alone_and_teaches_the_strategy(form: str) -> None:
    update = AWP(gamma=0.5) if form == "awp" else tiny("updater", "sam")
    objective, backbone = built(form=form, update=update, every=1), backbone_of("classifier", TASK)
    weights, began = state_of(backbone.model), [t.clone() for t in objective.strategy.state()]
    draws = objective.draw(backbone, BATCH, gen())
    assert same(state_of(backbone.model), weights)
    assert same(objective.strategy.state(), began)  # a step that fails has taught it nothing
    objective.after(backbone, BATCH, draws, gen())
    assert same(objective.strategy.state(), draws.learnt)
    assert not same(objective.strategy.state(), began)
    assert float(draws.reward) > 0


def test_the_step_in_the_reward_has_the_learning_rate_of_the_moment() -> None:
    rates: list[int] = []
    objective = built()
    objective.task = replace(TASK, lr=lambda step: rates.append(step) or 0.1)
    objective.draw(backbone_of("classifier", TASK), BATCH._replace(step=20), gen())
    assert rates == [20]


# The strategy.


PLAIN = FORMS["at"]._replace(clip=float("inf"))


def strategy_of(n: int = 3, *, momentum: bool = False) -> Strategy:
    """One head of n choices, each as likely; its features are the pixels."""
    network = LogSumExpEnergy(Flat(2), n)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.zero_()
    return Strategy(network, {"eps_px": torch.arange(n).float()}, momentum)


def learnt(strategy: Strategy, form: Form, reward: float, lr: float = 0.1) -> torch.Tensor:
    """The change of the head's biases by one update on indices 0, 0, 1, 2."""
    before = strategy.network.head.bias.detach().clone()
    index = {"eps_px": torch.tensor([0, 0, 1, 2])}
    heads = strategy.heads(torch.zeros(4, 1, 1, 2))
    strategy.reinforce(heads, index, torch.tensor(reward), form, lr)
    return strategy.network.head.bias.detach() - before


def test_reinforce_worked_by_hand() -> None:
    """-log p has the gradient p - e_a: chosen more often than likely, it becomes likelier."""
    wanted = 0.1 * 5 * (torch.tensor([0.5, 0.25, 0.25]) - 1 / 3)
    torch.testing.assert_close(learnt(strategy_of(), PLAIN, 5.0), wanted)
    torch.testing.assert_close(learnt(strategy_of(), PLAIN, -5.0), -wanted)
    assert float(learnt(strategy_of(), PLAIN, 0.0).abs().max()) == 0


def test_its_gradient_is_clipped_and_its_momentum_and_decay_are_those_of_sgd() -> None:
    short = learnt(strategy_of(), PLAIN._replace(clip=0.25), 500.0, lr=1.0)
    assert float(short.norm()) == pytest.approx(0.25, rel=1e-3)
    form = PLAIN._replace(momentum=0.9, weight_decay=0.2)
    ours, other = strategy_of(momentum=True), strategy_of()
    sgd = torch.optim.SGD(other.network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.2)
    for _ in range(3):
        learnt(ours, form, 2.0)
        loss = F.cross_entropy(other.heads(torch.zeros(4, 1, 1, 2))["eps_px"],
                               torch.tensor([0, 0, 1, 2]))  # fmt: skip
        sgd.zero_grad()
        (2.0 * loss).backward()
        sgd.step()
    torch.testing.assert_close(ours.network.state_dict(), other.network.state_dict())


def test_the_moving_average_of_rewards_is_subtracted_only_on_demand() -> None:
    strategy = strategy_of()
    gains = [float(strategy.advantage(torch.tensor(r))) for r in (4.0, 2.0)]
    assert gains == pytest.approx([4.0, 1.6])
    assert float(strategy.average) == pytest.approx(0.56)
    for baseline, moved in (("none", False), ("ema", True)):
        objective, backbone = built(baseline=baseline), backbone_of("classifier", TASK)
        draws = objective.draw(backbone, BATCH, gen())
        objective.after(backbone, BATCH, draws, gen())
        assert bool(objective.strategy.average) == moved


def test_actions_are_drawn_from_the_heads_and_a_single_choice_draws_nothing() -> None:
    p = torch.tensor([0.7, 0.2, 0.1])
    index = sampled({"a": p.log().expand(20_000, 3)}, gen())["a"]
    shares = torch.bincount(index, minlength=3) / len(index)
    torch.testing.assert_close(shares, p, rtol=0, atol=0.02)
    rng = gen()
    before = rng.get_state()
    assert not sampled({"a": torch.zeros(5, 1)}, rng)["a"].any()
    assert torch.equal(rng.get_state(), before)


@pytest.mark.parametrize(("form", "last"), [("at", 1e-4), ("trades", 1e-4), ("awp", 1e-6)])
def test_the_strategys_learning_rate_drops_with_the_models_in_the_form_with_awp(
    form: str, last: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, backbone = built(form=form, every=1), backbone_of("classifier", TASK)
    objective.task, rates = replace(TASK, total_steps=100), []
    monkeypatch.setattr(objective.strategy, "reinforce", lambda *args: rates.append(args[-1]))
    for step in (0, 49, 50, 74, 75, 99):
        objective.draw(backbone, BATCH._replace(step=step), gen())
    middle = (1e-4 * last) ** 0.5
    assert rates == pytest.approx([1e-4, 1e-4, middle, middle, last, last])


def test_images_of_the_update_are_attacked_by_the_strategy_as_it_has_just_learnt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, backbone = built(), backbone_of("classifier", TASK)
    resampled, states = objective.resampled, []

    def watched(*args: Any) -> Draws:
        states.append([t.clone() for t in objective.strategy.state()])
        return resampled(*args)

    monkeypatch.setattr(objective, "resampled", watched)
    draws = objective.draw(backbone, BATCH, gen())
    assert same(states, [draws.learnt])


def test_it_learns_every_so_many_steps() -> None:
    backbone, objective = backbone_of("classifier", TASK), built()
    taught = [
        bool(objective.draw(backbone, BATCH._replace(step=step), gen()).learnt)
        for step in (0, 1, 19, 20)
    ]
    assert taught == [True, False, False, True]


def test_a_strategy_that_is_not_finite_stops_the_run() -> None:
    backbone, objective = backbone_of("classifier", TASK), built()
    with torch.no_grad():
        objective.strategy.network.head.bias.fill_(torch.nan)
    updater = updater_of("plain", backbone.model)
    with pytest.raises(Diverged):
        train_step(backbone, objective, updater, BATCH._replace(step=1), gen(), Guard())


# Runs.


@pytest.mark.parametrize(("form", "baseline"), [("at", "ema"), ("trades", "none")])
def test_a_run_saves_and_resumes_the_strategy(tmp_path: Path, form: str, baseline: str) -> None:
    options = [f"objective.form={form}", "objective.every=1", "objective.strategy.norm=batch",
               f"objective.baseline={baseline}", "objective.iterations=[1, 2]"]  # fmt: skip
    resolved = toy_recipe(toy_registry(), "classifier", "lasat", "plain", *options)
    began, _, ended, resumed = cut_and_resumed(resolved, tmp_path)
    for part in ("model", "objective", "optimizer", "rng"):
        assert same(ended[part], resumed[part]), part
    heads = [state["objective"]["network"]["head.bias"] for state in (began, ended)]
    assert not torch.equal(*heads)
    assert bool(ended["objective"]["velocity"]) == (form == "trades")


def two_ranks(folder: str, shard: bool) -> dict[str, Any]:
    options = ["objective.every=1", "objective.iterations=[1, 2]", "run.batch_size=8"]
    sharded = ["run.shard=true"] if shard else []
    resolved = toy_recipe(toy_registry(), "classifier", "lasat", "awp", *options, *sharded)
    first = distributed.shard().rank == 0
    trainer = Trainer(
        resolved, RunFolder.create(Path(folder)) if first else RunFolder(Path(folder))
    )
    objective: Any = trainer.objective
    began = [t.clone() for t in objective.strategy.state()]
    trainer.run(until=3)
    strategy = {str(i): t.clone() for i, t in enumerate(objective.strategy.state())}
    return {"moved": not same([*strategy.values()], began), "strategy": strategy}


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_have_one_strategy(tmp_path: Path, shard: bool) -> None:
    one, other = every_rank(two_ranks, str(tmp_path / "run"), shard)
    assert one["moved"]
    assert same(one["strategy"], other["strategy"])


def test_options_without_effect_are_named() -> None:
    assert set(LASAT().unused()) == {"beta"}
    assert set(LASAT(form="trades").unused()) == {"smoothing"}
    assert set(LASAT(form="awp").unused()) == {"beta", "smoothing"}


def test_a_model_of_another_kind_is_attacked_too() -> None:
    """By its folded logits, or whatever it gives."""
    backbone = backbone_of("sadajem", TASK)
    assert isinstance(backbone, Backbone)
    draws = built(form="trades").draw(backbone, BATCH, gen())
    assert draws.x_adv.shape == BATCH.x.shape
