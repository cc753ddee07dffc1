"""FGSM, CW and the attacks on an energy: in the ball, at the end of their step, and effective."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adversary_tools import L2, LINF, data, judged, trained
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import seeds, uniform
from torch import Tensor
from toys import REGISTRY, Flat, gen, linear_model

from jemkit import PGD, Bounds
from jemkit.attacks.base import ModelAttack, Threat
from jemkit.attacks.pgd import margin
from jemkit.attacks.pixel_model import UNIT, PixelModel
from jemkit.data import Images
from jemkit.errors import MisfitError
from jemkit.models.energy import LinearEnergy, LogSumExpEnergy
from jemkit.testing import check_attack, toy_model, toy_task

FGSM, CW, ENERGY, DETECTOR = (REGISTRY["attack"][n] for n in ("fgsm", "cw", "energy", "detector"))
ATTACKS: dict[str, Any] = {
    "fgsm": FGSM(),
    "fgsm from a random start": FGSM(random_start=True),
    "cw": CW(steps=5),
    "cw with restarts": CW(steps=3, restarts=2),
    "energy of x": ENERGY(of="x", steps=5),
    "energy of x and y": ENERGY(steps=5),
    "detector": DETECTOR(steps=8),
    "detector by itself": DETECTOR(steps=8, limit="own"),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
each_threat = pytest.mark.parametrize("threat", [LINF, L2], ids=["Linf", "L2"])


def loss_of(subject: PixelModel, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(subject(x), y))


def energy_of(subject: PixelModel, x: Tensor, y: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        scores = subject.scores(x)
    return scores.energy if y is None else scores.joint(y)


@each_attack
def test_every_attack_keeps_the_laws_of_its_kind(attack: ModelAttack) -> None:
    check_attack(attack)


@each_attack
@each_threat
def test_what_an_attack_gives_is_in_the_ball_and_in_the_range(
    attack: ModelAttack, threat: Threat
) -> None:
    images = data()
    figures = judged(trained(), attack, images, threat)
    order = math.inf if threat.norm == "Linf" else 2.0
    size = (figures.x_adv - images.unit()).flatten(1).norm(order, dim=1)
    assert (size <= threat.eps * (1 + 1e-5) + 1e-6).all()
    assert size.max() > 0.5 * threat.eps
    assert figures.x_adv.min() >= 0
    assert figures.x_adv.max() <= 1


@each_attack
def test_an_attack_of_no_radius_gives_the_images_back(attack: ModelAttack) -> None:
    images = data(10)
    figures = judged(trained(), attack, images, Threat("Linf", 0))
    torch.testing.assert_close(figures.x_adv, images.unit(), rtol=0, atol=1e-7)


@each_attack
def test_l1_is_refused(attack: ModelAttack) -> None:
    with pytest.raises(MisfitError, match="L1"):
        attack.bind(trained(), Threat("L1", 255))


@pytest.mark.parametrize("name", ["fgsm", "cw", "cw with restarts", "energy of x and y"])
@each_threat
def test_an_attack_is_worse_for_the_classifier_than_noise(name: str, threat: Threat) -> None:
    images, subject = data(), trained()
    noise = judged(subject, PGD(steps=0), images, threat)
    figures = judged(subject, ATTACKS[name], images, threat)
    clean = loss_of(subject, images.unit(), images.y)
    noisy = loss_of(subject, noise.x_adv, images.y)
    assert loss_of(subject, figures.x_adv, images.y) > max(noisy, clean)
    assert int(figures.right.sum()) < int(noise.right.sum())


def corners(model: LogSumExpEnergy, y: Tensor) -> Tensor:
    """Where the cross-entropy of two classes rises in a linear model, [B, D]."""
    w = model.head.weight.detach()
    return torch.where(y[:, None] == 0, w[1] - w[0], w[0] - w[1])


@given(seed=seeds, radius=st.floats(1, 30), random=st.booleans())
def test_fgsm_ends_in_the_corner_of_the_ball_on_a_linear_model(
    seed: int, radius: float, random: bool
) -> None:
    model, y = linear_model(12, 2, seed), torch.tensor([0, 1, 0])
    x = uniform(seed, 3, 1, 3, 4, low=0.3, high=0.7)
    threat = Threat("Linf", radius)
    attack = FGSM(random_start=random).bind(PixelModel(model, UNIT), threat)["fgsm"]
    moved = (attack(x, y, gen(seed)) - x).flatten(1)
    expected = threat.eps * corners(model, y).sign()
    if random:
        assert (moved * expected >= -1e-6).all()  # a step of one radius from anywhere in the ball
        assert not torch.isclose(moved, expected, rtol=1e-4).all()
    else:
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


@example(seed=3165, radius=15.0)  # 2e-4 off the weights' direction in float32
@given(seed=seeds, radius=st.floats(1, 30))
def test_fgsm_in_l2_walks_one_radius_along_the_weights(seed: int, radius: float) -> None:
    """In float64: the slope is (p - 1) of one row of weights and p of the other, and in float32 a
    model that is sure has few digits of p - 1 left."""
    model, y = linear_model(12, 2, seed).double(), torch.tensor([0, 1, 0])
    x = uniform(seed, 3, 1, 3, 4, low=0.3, high=0.7).double()
    threat = Threat("L2", radius)
    attack = FGSM().bind(PixelModel(model, UNIT), threat)["fgsm"]
    moved = (attack(x, y, gen(seed)) - x).flatten(1)
    expected = threat.eps * F.normalize(corners(model, y), dim=1)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


def test_the_margin_is_the_labels_logit_less_the_best_other() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [-5.0, -5.0, -7.0]])
    assert margin(logits, torch.tensor([0, 1, 2])).tolist() == [-2.0, 1.0, -2.0]


def test_cw_finds_its_way_where_the_softmax_is_too_sure_for_a_gradient() -> None:
    model = linear_model(64, 3)
    with torch.no_grad():
        model.head.weight.mul_(1e3)
        model.head.bias.zero_()
    x = uniform(1, 20, 1, 8, 8, low=0.2, high=0.8)
    subject = PixelModel(model, UNIT)
    images, threat = Images(x, subject(x).argmax(1)), Threat("Linf", 30)
    assert loss_of(subject, x, images.y) == 0
    assert int(judged(subject, PGD(steps=20), images, threat).right.sum()) > 10
    assert int(judged(subject, CW(), images, threat).right.sum()) <= 2


@pytest.mark.parametrize("of", ["x", "xy"])
@each_threat
def test_the_energy_attack_raises_the_energy_of_every_image(of: str, threat: Threat) -> None:
    images, subject = data(), trained()
    y = None if of == "x" else images.y
    figures = judged(subject, ENERGY(of=of), images, threat)
    start = judged(subject, ENERGY(of=of, steps=0), images, threat)
    reached, begun = energy_of(subject, figures.x_adv, y), energy_of(subject, start.x_adv, y)
    clean = energy_of(subject, images.unit(), y)
    assert (reached >= begun - 1e-5).all()
    assert float(reached.mean()) > max(float(begun.mean()), float(clean.mean())) + 0.1


def test_more_steps_never_keep_a_lower_energy() -> None:
    images, subject = data(20), trained()
    stored = [
        energy_of(subject, judged(subject, ENERGY(of="x", steps=n, step_px=70), images).x_adv)
        for n in range(6)
    ]
    for before, after in itertools.pairwise(stored):
        assert (after >= before - 1e-5).all()


def test_each_energy_is_raised_most_by_the_attack_on_it() -> None:
    images, subject = data(), trained()
    marginal = judged(subject, ENERGY(of="x"), images).x_adv
    joint = judged(subject, ENERGY(of="xy"), images).x_adv
    assert energy_of(subject, marginal).mean() > energy_of(subject, joint).mean()
    y = images.y
    assert energy_of(subject, joint, y).mean() > energy_of(subject, marginal, y).mean()


@pytest.mark.parametrize("limit", ["percentile", "own"])
def test_what_falls_to_the_detector_attack_is_wrong_and_unseen(limit: str) -> None:
    images, subject = data(60), trained()
    attack = DETECTOR(limit=limit)
    figures = judged(subject, attack, images, Threat("Linf", 60))
    x = images.unit()
    clean, reached = energy_of(subject, x), energy_of(subject, figures.x_adv)
    limits = torch.cat([attack.limits(part) for part in clean.split(20)])
    fallen = ~figures.right
    with torch.no_grad():
        wrong = subject(figures.x_adv).argmax(1) != images.y
    assert 0 < int(fallen.sum()) < len(x)
    assert wrong[fallen].all()
    assert (reached[fallen] <= limits[fallen] + 1e-4).all()
    assert torch.equal(figures.x_adv[~fallen], x[~fallen])


def test_an_image_that_is_wrong_but_detected_goes_down_its_energy() -> None:
    model = LinearEnergy(Flat(2), 2)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[4.0, -0.1], [-4.0, 0.1]]))
        model.head.bias.copy_(torch.tensor([-2.0, 2.0]))
        model.energy.weight.copy_(torch.tensor([[0.0, -10.0]]))
        model.energy.bias.zero_()
    # the loss rises to the left and upwards, E(x) upwards: pgd ends wrong in the upper corner
    images = Images(
        torch.tensor([0.69, 0.5]).view(1, 1, 1, 2).repeat(20, 1, 1, 1), torch.zeros(20).long()
    )
    subject, threat = PixelModel(model, UNIT), Threat("Linf", 51)
    plain = judged(subject, PGD(steps=40), images, threat)
    assert not plain.right.any()
    assert (energy_of(subject, plain.x_adv) > energy_of(subject, images.x)).all()
    assert not judged(subject, DETECTOR(limit="own"), images, threat).right.any()


def test_a_detector_that_passes_everything_leaves_pgd() -> None:
    images, subject = data(), trained()
    figures = judged(subject, DETECTOR(limit=1e9, steps=20), images)
    plain = judged(subject, PGD(steps=20), images)
    assert torch.equal(figures.right, plain.right)
    fallen = ~figures.right
    assert fallen.any()
    torch.testing.assert_close(figures.x_adv[fallen], plain.x_adv[fallen], rtol=0, atol=0)


def test_a_detector_that_passes_nothing_gives_every_image_back() -> None:
    images = data()
    figures = judged(trained(), DETECTOR(limit=-1e9), images)
    assert torch.equal(figures.x_adv, images.unit())
    with torch.no_grad():
        assert torch.equal(figures.right, trained()(images.unit()).argmax(1) == images.y)


def test_a_limit_is_a_percentile_an_energy_or_the_clean_one() -> None:
    clean = torch.arange(21.0)
    assert DETECTOR().limits(clean).tolist() == [19.0] * 21
    assert DETECTOR(percentile=50, tolerance=0.5).limits(clean).tolist() == [10.5] * 21
    assert DETECTOR(limit=-3).limits(clean).tolist() == [-3.0] * 21
    assert torch.equal(DETECTOR(limit="own", tolerance=2).limits(clean), clean + 2)
    with pytest.raises(ValueError, match="limit"):
        DETECTOR(limit="theirs")


def test_labels_and_cards_say_what_was_done() -> None:
    labels = [ATTACKS[n].label for n in ("fgsm", "energy of x", "detector")]
    assert labels == ["fgsm", "energy", "detector"]
    assert CW().label == "cw20"
    assert CW(steps=7, restarts=2).label == "cw7x2"
    assert FGSM().card(LINF, 3)["step_px"] == 40
    assert CW().card(LINF, 3)["step_px"] == 10
    assert ENERGY(of="x").card(LINF, 3)["raised"] == "E(x)"
    assert ENERGY().card(LINF, 3)["raised"] == "E(x, y)"
    assert "percentile 95" in DETECTOR().card(LINF, 3)["limit"]
    assert DETECTOR(limit=-3).card(LINF, 3)["limit"] == -3


def test_the_range_of_the_model_does_not_change_what_a_radius_is() -> None:
    task = toy_task(bounds=Bounds(-2, 3))
    figures = judged(PixelModel(toy_model(task), task.bounds), FGSM(), data(10), LINF)
    assert math.isclose(figures.protocol["max_delta_px"]["Linf"], 40, rel_tol=1e-4)
