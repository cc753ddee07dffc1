"""DAT: losses and AUC worked by hand, the curriculum, the chains, frozen batch norm, and starts."""

from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
from logits import identity_backbone
from torch import Generator, Tensor
from toys import REGISTRY, Toy, backbone_of, gen, objective_of, toy_recipe, toy_registry, updater_of

from jemkit import (
    PGD,
    Backbone,
    Batch,
    Bounds,
    Guard,
    L2Descent,
    MisfitError,
    PixelModel,
    Trainer,
    check,
    resolve,
    train,
    train_step,
)  # fmt: skip
from jemkit.runtime import checkpoint
from jemkit.runtime.modes import batch_norms
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.testing import check_start, toy_batch, toy_task
from jemkit_plugins.dat.chains import FreshDensity, logistic_loss
from jemkit_plugins.dat.objective import DAT, DATObjective, Draws, wins
from jemkit_plugins.dat.starts import Blurred, Foreign, Shuffled, blurred, shuffled

TASK = toy_task()
BATCH = toy_batch(TASK, 6, positives=4)


class Fixed:
    """An initial distribution of the same images whenever it is asked."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        return self.x[:n].clone()


def flat(start: Tensor) -> Backbone:
    """A backbone whose logits are its images, [B, K], and whose chains begin from `start`."""
    backbone, free = identity_backbone(start.shape[1]), Bounds(-9, 9)
    density = FreshDensity(L2Descent(), 1, Fixed(start), start.shape[1], free)
    return Backbone(backbone.model, density, bounds=free)


def batch_of(x: Tensor, *y: int) -> Batch:
    return Batch(x, torch.tensor(y), x_pos=x, index=torch.arange(len(y)))


def objective(**options: Any) -> DATObjective:
    return DATObjective(DAT(attack=PGD(steps=0, start="clean"), **options))


def test_the_loss_worked_by_hand() -> None:
    x, x_neg = torch.tensor([[log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    draws = Draws(x_neg, x, torch.tensor(1.0))
    terms = objective().loss(flat(x_neg), batch_of(x, 0), draws)
    parts = {name: (w, float(term.detach())) for name, (w, term) in terms.parts.items()}
    # l(x) = log 4 and l(x-) = log 2: softplus(-l) = log(5 / 4), softplus(l) = log 3
    assert parts["BCE"] == (1.0, pytest.approx((log(5 / 4) + log(3)) / 2, rel=1e-5))
    assert parts["p(y|x~)"] == (1.0, pytest.approx(log(4 / 3), rel=1e-5))
    assert float(terms.total.detach()) == pytest.approx(sum(t for _, t in parts.values()), rel=1e-5)


def test_the_mean_is_over_data_and_chains_together() -> None:
    energy = torch.tensor([0.0, 0.0, 1.0])
    value = float(logistic_loss(energy[:2], energy[2:]))
    assert value == pytest.approx((2 * log(2) + log(1 + exp(-1))) / 3, rel=1e-5)


def test_a_shift_of_all_logits_changes_the_loss_and_its_best_is_at_energy_zero() -> None:
    pos, neg = torch.tensor([-1.0]), torch.tensor([1.0])
    losses = [float(logistic_loss(pos + c, neg + c)) for c in (-3.0, 0.0, 3.0)]
    assert losses[1] < min(losses[0], losses[2])
    gap = [float((pos + c).mean() - (neg + c).mean()) for c in (-3.0, 0.0, 3.0)]
    assert gap[0] == gap[1] == gap[2]  # a difference of energies does not see it


def test_the_auc_by_hand() -> None:
    result = wins(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0]))
    assert torch.equal(result, torch.tensor([[1.0, 1.0], [0.0, 0.5]]))
    assert float(result.mean()) == 5 / 8


def test_the_auc_is_of_the_logit_of_the_class_and_not_of_the_energy() -> None:
    backbone = flat(torch.tensor([[0.0, 5.0]]))  # f[0] is lower and log-sum-exp higher than of x
    draws = objective().draw(backbone, batch_of(torch.tensor([[1.0, 0.0]]), 0), gen())
    assert float(draws.auc) == 1


def test_without_steps_the_negatives_are_the_starts() -> None:
    backbone = backbone_of("dat", TASK)
    draws = objective_of("dat").draw(backbone, BATCH, gen())
    assert torch.equal(draws.x_neg, backbone.density.start.draw(4, gen()))


def test_a_chain_climbs_its_own_class_by_steps_of_one_length_without_noise() -> None:
    start, part = torch.zeros(2, 3), objective(step_px=255 * 0.1)
    part.steps = 2
    draws = part.draw(flat(start), batch_of(torch.ones(2, 3), 2, 0), gen())
    far = 2 * 0.1 * 18  # two steps of 0.1 of the range, which is 18 wide
    expected = torch.tensor([[0.0, 0.0, far], [far, 0.0, 0.0]])
    torch.testing.assert_close(draws.x_neg, expected)


def test_the_labels_of_chains_are_those_of_the_densitys_images() -> None:
    x = torch.zeros(3, 3)
    batch = batch_of(x, 1, 2, 0)._replace(x_pos=x[:2])
    part = objective()
    part.steps = 1
    climbed = part.draw(flat(torch.zeros(2, 3)), batch, gen()).x_neg
    assert climbed.argmax(1).tolist() == [1, 2]
    assert len(climbed) == 2


def test_a_chain_without_a_gradient_stays_where_it_is() -> None:
    backbone = flat(torch.full((2, 3), 0.5))
    with torch.no_grad():
        backbone.model.head.weight.zero_()
    part = objective()
    part.steps = 3
    draws = part.draw(backbone, batch_of(torch.ones(2, 3), 0, 1), gen())
    assert torch.equal(draws.x_neg, torch.full((2, 3), 0.5))
    assert float(draws.auc) == 0.5


def test_a_chain_stays_in_the_range() -> None:
    part = objective(step_px=200)
    part.steps = 3
    draws = part.draw(flat(torch.zeros(1, 3)), batch_of(torch.ones(1, 3), 1), gen())
    assert float(draws.x_neg.max()) == 9


def after(part: DATObjective, *aucs: float, n: int = 4) -> list[int]:
    """T after each of these steps."""
    backbone, batch, lengths = backbone_of("dat", TASK), toy_batch(TASK, n), []
    for auc in aucs:
        part.after(backbone, batch, Draws(BATCH.x, BATCH.x, torch.tensor(auc)), gen())
        lengths.append(part.steps)
    return lengths


def test_chains_grow_when_the_window_is_full_and_its_mean_reaches_the_threshold() -> None:
    part = objective(window=9, auc=0.8)  # of batches of 4: three steps
    assert after(part, 0.9, 0.9, 0.5) == [0, 0, 0]  # a mean of 0.77
    assert after(part, 0.9) == [0]  # 0.77: the window goes on
    assert after(part, 1.0) == [1]  # 0.8 of the last three
    assert after(part, 1.0, 1.0, 1.0) == [1, 1, 2]  # and then it is emptied
    assert after(part, 0.0, 0.0, 0.0, 0.0) == [2] * 4  # never shorter


def test_chains_grow_to_their_longest() -> None:
    part = objective(window=1, max_steps=2)
    assert after(part, *[1.0] * 5) == [1, 2, 2, 2, 2]
    assert part.window == []


def test_the_window_counts_images() -> None:
    for n, steps in ((2, 5), (4, 3), (10, 1), (20, 1)):
        part = objective(window=10)
        assert after(part, *[1.0] * steps, n=n) == [0] * (steps - 1) + [1]


def test_batch_norm_rests_bitwise_while_its_affine_parameters_learn() -> None:
    backbone = backbone_of("dat", TASK)
    backbone.model.train()
    before = {n: b.clone() for n, b in backbone.model.named_buffers()}
    affine = [m.weight.detach().clone() for m in batch_norms(backbone.model)]
    part, updater = objective_of("dat"), updater_of("plain", backbone.model)
    for _ in range(3):
        train_step(backbone, part, updater, BATCH, gen(), Guard())
    assert before
    assert affine
    assert all(torch.equal(before[n], b) for n, b in backbone.model.named_buffers())
    for then, norm in zip(affine, batch_norms(backbone.model), strict=True):
        assert not torch.equal(then, norm.weight)
    assert all(m.training and m.track_running_stats for m in batch_norms(backbone.model))


def test_with_frozen_batch_norm_rows_of_the_loss_do_not_depend_on_each_other() -> None:
    x = BATCH.x_pos
    one = Batch(x[:1], BATCH.y[:1], x_pos=x[:1], index=torch.arange(1))
    two = Batch(x[:2], BATCH.y[:2], x_pos=x[:2], index=torch.arange(2))
    other = one._replace(x=x[1:2], x_pos=x[1:2], y=BATCH.y[1:2])
    losses = {}
    for freeze in (True, False):
        part = objective(freeze_batch_norm=freeze)
        for name, batch in (("both", two), ("first", one), ("second", other)):
            draws = Draws(batch.x, batch.x, torch.tensor(0.5))
            terms = part.loss(backbone_of("dat", TASK), batch, draws)
            losses[freeze, name] = float(terms.parts["p(y|x~)"][1].detach())
    mean = {f: (losses[f, "first"] + losses[f, "second"]) / 2 for f in (True, False)}
    assert losses[True, "both"] == pytest.approx(mean[True], rel=1e-5)
    assert losses[False, "both"] != pytest.approx(mean[False], rel=1e-3)


def test_a_step_that_fails_has_grown_nothing() -> None:
    backbone, part = backbone_of("dat", TASK), objective_of("dat")
    part.draw(backbone, BATCH, gen())
    assert part.state_dict() == {"steps": 0, "window": []}  # type: ignore[attr-defined]


def test_a_run_resumes_its_curriculum_bit_for_bit(tmp_path: Path) -> None:
    options = ["objective.auc=0.4", "objective.window=17"]  # two steps of nine images
    resolved = toy_recipe(toy_registry(), "dat", "dat", "plain", *options)
    whole = Trainer(resolved, RunFolder.create(tmp_path / "whole"))
    whole.run(until=8)
    cut = Trainer(resolved, RunFolder.create(tmp_path / "cut"))
    cut.run(until=3)  # inside a window
    saved = checkpoint.load(tmp_path / "cut" / "checkpoints" / "step-00000003")
    assert len(saved["objective"]["window"]) in (0, 1)
    other = Trainer(resolved, RunFolder.create(tmp_path / "other"))
    other.load_state_dict(saved)
    other.run(until=8)
    for part in ("model", "objective", "optimizer"):
        assert same(whole.state_dict()[part], other.state_dict()[part]), part
    assert whole.state_dict()["objective"]["steps"] > 0


def test_the_second_stage_begins_from_the_weights_of_the_first(tmp_path: Path) -> None:
    registry = toy_registry()
    first = toy_recipe(
        registry, "classifier", "pgdat", "plain", "run.epochs=1", "run.ema_decay=0.5"
    )
    train(first, tmp_path / "one", registry=registry)
    second = toy_recipe(registry, "dat", "dat", "plain", "run.epochs=1")
    train(second, tmp_path / "two", registry=registry, init_from=tmp_path / "one")
    began = checkpoint.load(tmp_path / "two" / "checkpoints" / "step-00000000")["model"]
    assert same(began, checkpoint.load_weights(tmp_path / "one" / "checkpoints" / "best"))


def test_new_chains_have_class_i_mod_k_where_none_are_given() -> None:
    backbone = flat(torch.zeros(5, 3))
    settings = {"steps": 1, "start": backbone.density.start}
    x = backbone.density.sample(backbone.model, 5, gen(), **settings)
    assert x.argmax(1).tolist() == [0, 1, 2, 0, 1]
    y = torch.tensor([2, 2, 1, 0, 0])
    x = backbone.density.sample(backbone.model, 5, gen(), **settings, y=y)
    assert x.argmax(1).tolist() == y.tolist()
    assert backbone.density.state_dict() == {}


def test_a_classifier_is_refused() -> None:
    with pytest.raises(MisfitError, match="has no density"):
        check(backbone_of("classifier", TASK), objective_of("dat"))


def test_its_attack_begins_at_the_image_in_l2_and_on_digits_in_linf() -> None:
    result = DAT().attack
    assert (result.norm, result.radius_px, result.step_px) == ("L2", 127.5, 25.5)  # type: ignore[attr-defined]
    named = {"backbone": {"use": "dat"}, "objective": {"use": "dat"}}
    digits = resolve(REGISTRY, named={**named, "data": {"use": "digits"}}).recipe
    attack: Any = digits.objective.attack  # type: ignore[union-attr]
    assert (attack.norm, attack.radius_px, attack.start) == ("Linf", 25.5, "clean")


@pytest.mark.parametrize("name", ["dat", "dat-cifar100", "dat-linf"])
def test_stages_have_one_network_and_one_ball(name: str) -> None:
    stage = "dat-stage1" if name != "dat-linf" else "dat-linf-stage1"
    data = {"data": {"use": "cifar100" if "100" in name else "cifar10"}}
    one, two = (resolve(REGISTRY, preset=preset, named=data).recipe for preset in (stage, name))
    assert one.backbone.network == two.backbone.network  # type: ignore[attr-defined]
    balls = [(o.attack.norm, o.attack.radius_px) for o in (one.objective, two.objective)]  # type: ignore[union-attr]
    assert balls[0] == balls[1]
    assert two.run.ema_warmup
    assert two.schedule.factor(0, 10) == two.schedule.factor(9, 10) == 1


def test_the_blur_worked_by_hand() -> None:
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = 1
    weights = torch.tensor([exp(-(d**2) / 2) for d in range(-3, 4)])
    weights /= weights.sum()
    changed = blurred(x, sigma=1.0)
    torch.testing.assert_close(changed[0, 0, 1:8, 1:8], weights[:, None] * weights)
    torch.testing.assert_close(
        blurred(torch.full((2, 3, 8, 8), 0.3), 2.0), torch.full((2, 3, 8, 8), 0.3)
    )


def test_shuffled_squares_are_those_of_the_image_in_another_order() -> None:
    x = torch.arange(2 * 3 * 64.0).view(2, 3, 8, 8)
    changed = shuffled(x, 4, gen())

    def squares(image: Tensor) -> list[list[float]]:
        pieces = [image[:, r : r + 2, c : c + 2] for r in range(0, 8, 2) for c in range(0, 8, 2)]
        return sorted(piece.flatten().tolist() for piece in pieces)

    for before, now in zip(x, changed, strict=True):
        assert squares(before) == squares(now)
        assert not torch.equal(before, now)
    assert torch.equal(changed, shuffled(x, 4, gen()))


def test_images_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(MisfitError, match=r"8 px cannot be cut into 3 x 3 .* divisor of 8"):
        Shuffled(squares=3).build(TASK, torch.device("cpu"))


def test_images_of_another_set_begin_chains_if_they_have_the_shape() -> None:
    check_start(Foreign(dataset=Toy()))
    start = Foreign(dataset=Toy()).build(TASK, torch.device("cpu"))
    own = TASK.bounds.from_unit(Toy().load("train").unit())
    assert all(any(torch.equal(x, image) for image in own) for x in start.draw(5, gen()))
    other = Foreign(dataset=Toy()).build(replace(TASK, shape=(3, 8, 8)), torch.device("cpu"))
    with pytest.raises(MisfitError, match=r"images of \[1, 8, 8\], and the data set \[3, 8, 8\]"):
        other.draw(1, gen())


@pytest.mark.parametrize("spec", [Blurred(), Shuffled()])
def test_starts_are_not_training_images(spec: Any) -> None:
    x = spec.build(TASK, torch.device("cpu")).draw(10, gen())
    own = TASK.bounds.from_unit(TASK.images("train").unit())
    assert not any(torch.equal(image, one) for image in x for one in own)


def test_generation_and_evaluation_see_a_density() -> None:
    backbone = backbone_of("dat", TASK)
    subject = PixelModel(backbone.model, TASK.bounds, backbone.density)
    x = subject.sample(7, gen(), steps=3)
    assert x.shape == (7, *TASK.shape)
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
