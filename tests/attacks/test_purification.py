"""Models that refine their input: each image alone and the same every time; attacks on them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from adversary_tools import LINF, data, judged, trained
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, uniform
from torch import Tensor
from toys import REGISTRY, gen, linear_model

from jemkit import PGD, Bounds
from jemkit.attacks.base import ModelAttack, Perturb, Threat
from jemkit.attacks.pixel_model import UNIT, PixelModel
from jemkit.attacks.purification import Draw, Refined, Refinement, Slope, refined
from jemkit.errors import MisfitError, Preempted
from jemkit.models.energy import Scores
from jemkit.options import Options
from jemkit.runtime.modes import frozen
from jemkit.testing import check_attack

EOT, BPDA = REGISTRY["attack"]["eot"], REGISTRY["attack"]["bpda"]
STILL = {"noise": 0.0, "jitter": 0.0}


def linear(seed: int = 0) -> PixelModel:
    return PixelModel(linear_model(12, 3, seed).double(), UNIT)


def images_of(seed: int, n: int = 4) -> Tensor:
    return uniform(seed, n, 1, 3, 4, low=0.2, high=0.8).double()


def slope_of(subject: Refined, x: Tensor, y: Tensor, slope: Slope) -> Tensor:
    """The gradient of the cross-entropy that an attack sees, [B, C, H, W]."""
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(subject.scores(x, slope=slope).logits, y, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


refinements = st.builds(
    Refinement,
    steps=st.integers(0, 4),
    noise=st.sampled_from([0.0, 0.05]),
    jitter=st.sampled_from([0.0, 0.1]),
    samples=st.integers(1, 3),
    seed=st.integers(0, 9),
)


@given(seed=seeds, refinement=refinements)
def test_a_batch_is_refined_as_its_images_are_one_by_one(seed: int, refinement: Refinement) -> None:
    x, subject = images_of(seed), refined(linear(seed % 100), refinement)
    together = subject.scores(x)
    alone = [subject.scores(image[None]) for image in x.flip(0)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts).flip(0), rtol=1e-9, atol=1e-9)


def test_a_network_with_batch_norm_refines_images_one_by_one_too() -> None:
    x, subject = data(6).unit(), refined(trained(), Refinement(steps=3, **STILL))
    alone = torch.cat([subject(image[None]) for image in x])
    torch.testing.assert_close(subject(x), alone, rtol=1e-4, atol=1e-4)


@given(seed=seeds, refinement=refinements)
def test_an_answer_repeats_and_leaves_torchs_own_generator_alone(
    seed: int, refinement: Refinement
) -> None:
    x, subject = images_of(seed), refined(linear(), refinement)
    before = torch.get_rng_state()
    first = subject(x)
    subject(1 - x)  # whatever is asked between
    assert torch.equal(subject(x), first)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(subject(x), first)


def test_noise_depends_on_the_seed_and_on_the_image() -> None:
    x = images_of(0)
    answers = [refined(linear(), Refinement(seed=seed))(x) for seed in (0, 1)]
    assert not torch.isclose(*answers).any()
    subject = Refined(linear(), Refinement(steps=0, jitter=1.0, samples=1))
    near = torch.cat([x[:1], x[:1] + 1e-9, x[:1]])
    one, other, again = subject(near)
    assert torch.equal(one, again)
    assert not torch.isclose(one, other, atol=1e-3).any()


@pytest.mark.parametrize(
    ("options", "random"),
    [
        ({}, True),
        (STILL, False),
        ({"noise": 0, "jitter": 0.1}, True),
        ({"noise": 0.1, "jitter": 0}, True),
        ({"noise": 0.1, "jitter": 0, "steps": 0}, False),
    ],
)
def test_a_model_says_whether_its_answer_is_random(options: dict[str, Any], random: bool) -> None:
    subject = Refined(linear(), Refinement(**options))
    assert subject.random is random
    assert subject.card["refinement"]["random"] is random
    assert subject.refinement.copies == (5 if random else 1)
    other = subject.scores(images_of(0), gen(1)).logits
    assert torch.equal(other, subject.scores(images_of(0), gen(2)).logits) is not random


def test_no_steps_and_no_noise_leave_the_model_as_it_is() -> None:
    x = data(5).unit()
    subject = refined(trained(), Refinement(steps=0, **STILL))
    assert torch.equal(subject(x), trained()(x))
    assert torch.equal(subject.scores(x).energy, trained().scores(x).energy)


@given(seed=seeds, steps=st.integers(1, 5))
def test_small_steps_without_noise_go_down_the_energy(seed: int, steps: int) -> None:
    plain, x = linear(seed % 100), images_of(seed)
    subject = refined(plain, Refinement(steps=steps, step_size=0.01, **STILL))
    assert (subject.scores(x).energy < plain.scores(x).energy).all()


def test_one_step_is_the_step_of_the_formula() -> None:
    plain, x = linear(), images_of(3)
    weight = plain.model.head.weight  # dE/dx = -sum_k p_k w_k
    p = plain(x).softmax(1)
    expected = x.flatten(1) + 0.3 * p @ weight
    subject = Refined(plain, Refinement(steps=1, step_size=0.3, **STILL))
    z = subject.refine(x, torch.zeros_like)
    torch.testing.assert_close(z.flatten(1), expected)
    torch.testing.assert_close(subject(x), plain(z))


def test_steps_are_in_the_units_of_the_model() -> None:
    model = linear_model(12, 3).double()
    wide = Refined(PixelModel(model, Bounds(-1, 1)), Refinement(steps=2, step_size=0.2, **STILL))
    unit = Refined(PixelModel(model, UNIT), Refinement(steps=2, step_size=0.2, **STILL))
    x = images_of(1)
    torch.testing.assert_close(wide(x), unit(2 * x - 1))


def test_logits_are_averaged_over_the_copies() -> None:
    x = images_of(2)
    subject = Refined(linear(), Refinement(steps=0, jitter=0.5, samples=400))
    plain = linear()(x)
    torch.testing.assert_close(subject(x), plain, rtol=0, atol=0.5)
    one = Refined(linear(), Refinement(steps=0, jitter=0.5, samples=1))
    assert (one(x) - plain).abs().mean() > 5 * (subject(x) - plain).abs().mean()


@given(seed=seeds, steps=st.integers(0, 4))
def test_the_exact_gradient_is_that_of_finite_differences(seed: int, steps: int) -> None:
    x, y = images_of(seed, 2), torch.tensor([0, 1])
    subject = Refined(linear(seed % 100), Refinement(steps=steps, step_size=0.1, **STILL))
    direction = uniform(seed + 1, *x.shape).double()

    def loss(t: float) -> Tensor:
        return F.cross_entropy(subject(x + t * direction), y, reduction="sum").detach()

    slope = (slope_of(subject, x, y, "exact") * direction).sum()
    difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-6)


@given(seed=seeds, steps=st.integers(1, 4))
def test_the_straight_through_gradient_is_the_one_at_the_refined_image(
    seed: int, steps: int
) -> None:
    x, y = images_of(seed, 2), torch.tensor([0, 1])
    plain = linear(seed % 100)
    subject = Refined(plain, Refinement(steps=steps, step_size=0.1, **STILL))
    z = subject.refine(x, torch.zeros_like).detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(plain(z), y, reduction="sum"), z)
    slope = slope_of(subject, x, y, "straight_through")
    torch.testing.assert_close(slope, expected)


def test_the_two_gradients_differ() -> None:
    x, y = 0.01 * images_of(0, 2), torch.tensor([0, 1])
    subject = Refined(linear(), Refinement(steps=2, step_size=0.1, **STILL))
    exact, straight = (slope_of(subject, x, y, s) for s in ("exact", "straight_through"))
    assert not torch.allclose(exact, straight, rtol=1e-2)


def test_both_gradients_belong_to_the_same_answer() -> None:
    x = data(4).unit().requires_grad_()
    subject = Refined(trained(), Refinement(steps=3))
    answers = [subject.scores(x, slope=slope).logits for slope in ("exact", "straight_through")]
    assert torch.equal(*answers)
    options = Refinement(steps=3, gradient="straight_through")
    assert torch.equal(Refined(trained(), options)(x), answers[0])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("attack", [EOT(), BPDA(), EOT(steps=4, step_px=3)], ids=str)
def test_without_a_refinement_eot_and_bpda_are_pgd(attack: Any, norm: Any) -> None:
    images, threat = data(30), Threat(norm, 40 if norm == "Linf" else 300)
    subject = refined(trained(), Refinement(steps=0, **STILL))
    figures = judged(subject, attack, images, threat)
    plain = PGD(steps=attack.steps, step_px=attack.step_px)
    expected = judged(trained(), plain, images, threat)
    assert torch.equal(figures.x_adv, expected.x_adv)
    assert torch.equal(figures.right, expected.right)
    assert not torch.equal(figures.x_adv, images.unit())


def test_on_a_model_without_noise_eot_is_pgd_too() -> None:
    images = data(30)
    figures = judged(trained(), EOT(samples=1), images)
    assert torch.equal(figures.x_adv, judged(trained(), PGD(steps=20), images).x_adv)
    several = judged(trained(), EOT(samples=3), images)
    assert float((several.right == figures.right).float().mean()) > 0.9


class Masked(Refined):
    """Refines out of sight of autograd: no gradient reaches the input."""

    def refine(self, x: Tensor, draw: Draw) -> Tensor:
        return super().refine(x, draw).detach() + 0 * x


def test_a_refinement_that_hides_its_gradient_stops_pgd_and_not_bpda() -> None:
    images = data(30)
    subject = Masked(trained(), Refinement(steps=3, step_size=0.2, **STILL))
    noise = judged(subject, PGD(steps=0), images).right.float().mean()
    blind = judged(subject, PGD(steps=20), images).right.float().mean()
    sighted = judged(subject, BPDA(), images).right.float().mean()
    assert noise == blind
    assert sighted < blind - 0.2


class Shaken(PixelModel):
    """Adds a strong random linear function to every logit, another in each pass."""

    def __init__(self, inner: PixelModel) -> None:
        super().__init__(inner.model, inner.bounds)
        self.rng = gen(7)

    def scores(self, pixels: Tensor) -> Scores:
        scores = super().scores(pixels)
        tilt = torch.randn((3, pixels[0].numel()), generator=self.rng, dtype=pixels.dtype)
        return Scores(scores.logits + 3 * (pixels - 0.5).flatten(1) @ tilt.T, scores.energy)


def test_eot_finds_the_mean_gradient_of_any_random_model() -> None:
    plain = PixelModel(linear_model(64, 3), UNIT)
    x = uniform(3, 20, 1, 8, 8, low=0.3, high=0.7)
    with frozen(plain):
        y = plain(x).argmax(1)
        losses = []
        for samples in (1, 100):
            perturb = EOT(steps=3, samples=samples).bind(Shaken(plain), Threat("Linf", 10))
            x_adv = perturb["eot3"](x, y, gen())
            losses.append(float(F.cross_entropy(plain(x_adv), y)))
    assert losses[1] > losses[0]


@pytest.mark.parametrize("attack", [EOT(samples=2, steps=5), BPDA(samples=2, steps=5)], ids=str)
def test_an_attack_that_averages_fools_a_noisy_refinement(attack: ModelAttack) -> None:
    images = data(30)
    subject = refined(trained(), Refinement(steps=2, step_size=0.2, samples=2))
    with torch.no_grad():
        clean = F.cross_entropy(subject(images.unit()), images.y)
        figures = judged(subject, attack, images)
        assert F.cross_entropy(subject(figures.x_adv), images.y) > clean
    assert float(figures.right.float().mean()) < 0.9
    assert torch.equal(figures.x_adv, judged(subject, attack, images).x_adv)


class OnRefined(Options):
    """An attack that needs a refinement, on any model."""

    everyone: ClassVar[bool] = True

    name: str
    steps: int

    @property
    def attack(self) -> Any:
        return REGISTRY["attack"][self.name](steps=3, samples=2)

    @property
    def label(self) -> str:
        return str(self.attack.label)

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        options = Refinement(steps=self.steps, step_size=0.1, samples=2)
        result: Mapping[str, Perturb] = self.attack.bind(refined(subject, options), threat)
        return result

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        return dict(self.attack.card(threat, n_classes))


@pytest.mark.parametrize("name", ["eot", "bpda"])
@pytest.mark.parametrize("steps", [0, 2])
def test_eot_and_bpda_keep_the_laws_of_an_attack(name: str, steps: int) -> None:
    check_attack(OnRefined(name=name, steps=steps))
    check_attack(EOT(steps=3, samples=2))


@pytest.mark.parametrize("attack", [EOT(), BPDA()], ids=str)
def test_l1_is_refused(attack: ModelAttack) -> None:
    with pytest.raises(MisfitError, match="L1"):
        attack.bind(refined(trained(), Refinement()), Threat("L1", 255))


def test_bpda_says_what_it_is_for_where_nothing_is_refined() -> None:
    with pytest.raises(MisfitError, match="models that purify their input"):
        BPDA().bind(trained(), LINF)


def test_a_model_is_refined_once() -> None:
    with pytest.raises(MisfitError, match="already"):
        refined(refined(trained(), Refinement()), Refinement())


def test_another_refinement_is_another_subject_for_half_done_work() -> None:
    subjects = [refined(linear(), Refinement(steps=k)) for k in (1, 2)]
    assert repr(subjects[0]) != repr(subjects[1])
    assert repr(subjects[0]) == repr(refined(linear(), Refinement(steps=1)))


def test_a_stop_is_handled_inside_the_chain() -> None:
    subject, calls = refined(trained(), Refinement(steps=5)), []

    def poll() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Preempted("stopped")

    subject.poll = poll
    with pytest.raises(Preempted):
        subject(data(2).unit())


def test_labels_and_cards_say_which_gradient_was_taken() -> None:
    assert (EOT().label, BPDA(steps=7).label) == ("eot20", "bpda7")
    assert "exact" in EOT().card(LINF, 3)["gradient"]
    assert "straight-through" in BPDA().card(LINF, 3)["gradient"]
    assert Refined(linear(), Refinement()).card["refinement"]["gradient"] == "exact"
