"""What judges a model sees [0, 1] images and gives back what can be counted by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, uniform
from torch import Tensor
from toys import gen, linear_model

from jemkit import PGD, Bounds, DataError, EnergyModel, Figure, Images, PixelModel
from jemkit.attacks.base import Threat
from jemkit.metrics.attack_runner import attacked
from jemkit.metrics.energy_gap import Robustness
from jemkit.metrics.evaluator import Accuracy, Context, measure
from jemkit.metrics.figures import near_chance, share
from jemkit.runtime.pytree import same
from jemkit.testing import toy_model, toy_task
from jemkit.testing.law import state_of

TASK = toy_task(n_train=40)


def context(radius_px: float = 8.0, norm: str = "Linf", **settings: object) -> Context:
    return Context(gen(), Threat(norm, radius_px), **settings)


def pgd(steps: int) -> Robustness:
    return Robustness(attack=PGD(steps=steps))


def adversarial(subject: PixelModel, x: Tensor, y: Tensor, steps: int, ctx: Context) -> Tensor:
    collected: list[Tensor] = []

    def judge(subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        collected.append(attacked(subject, PGD(steps=steps), data, ctx, "pgd").x_adv)
        return []

    measure(subject, Images(x, y), [judge], ctx)
    return collected[0]


def figures(model: EnergyModel, data: Images, judge: object, ctx: Context) -> dict[str, Figure]:
    measured = measure(PixelModel(model, Bounds()), data, [judge], ctx)
    return {figure.name: figure for figure in measured}


@pytest.mark.parametrize(("right", "n", "low", "high"), [
    (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341),
    (81, 263, 0.25529, 0.36621),  # Newcombe 1998, Table I
    (1, 29, 0.00611, 0.17176),  # the same
])  # fmt: skip
def test_the_interval_of_a_share_is_wilsons(right: int, n: int, low: float, high: float) -> None:
    figure = share("clean", right, n, {})
    assert figure.value == right / n
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=2e-4)


@given(n=st.integers(1, 2000), part=st.floats(0, 1))
def test_an_interval_holds_its_share_and_stays_in_zero_to_one(n: int, part: float) -> None:
    figure = share("clean", round(part * n), n, {})
    assert 0 <= figure.low <= figure.value + 1e-9
    assert figure.value - 1e-9 <= figure.high <= 1


@given(seed=st.integers(0, 100), batch_size=st.integers(1, 50))
def test_accuracy_through_the_wrapper_is_that_of_the_model_itself_for_any_batch_size(
    seed: int, batch_size: int
) -> None:
    model, data = toy_model(TASK, seed=seed), TASK.images("valid")
    model.train()
    model(TASK.bounds.from_unit(TASK.images("train").unit()))  # statistics other than the first
    measured = figures(model, data, Accuracy(), context(batch_size=batch_size))["clean"]
    model.eval()
    native = model(2 * data.unit() - 1).logits.argmax(1) == data.y
    assert measured.value == native.float().mean()
    assert measured.n == len(data.y)


def test_the_wrapper_gives_logits_and_not_probabilities() -> None:
    subject = PixelModel(linear_model(12, 3), Bounds())
    pixels = uniform(0, 5, 1, 3, 4, low=0)
    logits = subject(pixels)
    assert torch.equal(logits, subject.model(2 * pixels - 1).logits)
    assert not torch.allclose(logits.sum(1), torch.ones(5))
    assert float(logits.detach().min()) < 0


def test_measurements_are_repeatable_and_leave_the_model_alone() -> None:
    model, data = toy_model(TASK).train(), TASK.images("valid")
    before = state_of(model)
    for judge in (Accuracy(), pgd(2)):
        one, two = (figures(model, data, judge, context()) for _ in range(2))
        assert [f[:5] for f in one.values()] == [f[:5] for f in two.values()]
    assert same(state_of(model), before)


@given(seed=seeds, radius=st.floats(1, 40), norm=st.sampled_from(["Linf", "L2"]))
def test_attacked_images_are_within_the_radius_in_pixel_units(
    seed: int, radius: float, norm: str
) -> None:
    subject = PixelModel(linear_model(64, 3, seed % 1000), Bounds())
    x, y = uniform(seed, 4, *TASK.shape, low=0), torch.tensor([0, 1, 2, 0])
    x_adv = adversarial(subject, x, y, 3, context(radius, norm))
    order = 2.0 if norm == "L2" else math.inf
    assert ((x_adv - x).flatten(1).norm(order, dim=1) <= radius / 255 * (1 + 1e-5) + 1e-6).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_eight_pixels_are_eight_of_255_in_zero_to_one_and_sixteen_inside() -> None:
    subject = PixelModel(linear_model(64, 3), Bounds())
    x, y = torch.full((2, *TASK.shape), 0.5), torch.tensor([0, 1])
    x_adv = adversarial(subject, x, y, 9, context(8))
    assert math.isclose(float((x_adv - x).abs().max()), 8 / 255, rel_tol=1e-5)
    inside = Bounds().from_unit(x_adv) - Bounds().from_unit(x)
    assert math.isclose(float(inside.abs().max()), 16 / 255, rel_tol=1e-5)


@given(seed=seeds)
def test_on_a_linear_model_an_image_falls_exactly_where_its_margin_is_reached(seed: int) -> None:
    """|f_0 - f_1| of two linear logits falls by 2 eps |w_0 - w_1|_1 under the worst x~."""
    model = linear_model(64, 2, seed)
    pixels = uniform(seed, 60, *TASK.shape, low=0.3, high=0.7)
    w, logits = model.head.weight.detach(), model(2 * pixels - 1).logits
    y = logits.argmax(1)
    margin = (logits[:, 0] - logits[:, 1]).abs().detach()
    reach = margin / (2 * (w[0] - w[1]).abs().sum()) * 255  # of each image, in pixels
    radius = float(reach.median()) + 1e-4
    safe = reach > radius + 1e-3
    undecided = int(((reach - radius).abs() <= 1e-3).sum())
    data = Images(pixels, y)
    measured = figures(model, data, pgd(10), context(radius))["pgd10"]
    assert abs(measured.value * 60 - int(safe.sum())) <= undecided


def test_the_gaps_are_those_of_the_attacked_images_one_by_one() -> None:
    model, data, ctx = linear_model(64, 3), TASK.images("valid"), context(8)
    measured = figures(model, data, pgd(3), ctx)
    subject, x = PixelModel(model, Bounds()), data.unit()
    x_adv = adversarial(subject, x, data.y, 3, context(8))
    clean, adv = model(2 * x - 1), model(2 * x_adv - 1)
    gap = (adv.energy - clean.energy).double().detach()
    expected = {
        "gap_mean": gap.abs().mean(),
        "gap_variance": gap.abs().var(correction=0),
        "gap_signed": gap.mean(),
        "gap_joint": (adv.joint(data.y) - clean.joint(data.y)).mean(),
        "gap_relative": gap.abs().mean() / clean.energy.detach().double().std(correction=0),
    }
    for name, value in expected.items():
        assert measured[name].value == pytest.approx(float(value.detach()), rel=1e-4)


def test_the_relative_gap_does_not_grow_with_the_logits() -> None:
    model, data = linear_model(64, 3), TASK.images("valid")
    with torch.no_grad():  # far from flat, where the energy is the largest logit
        model.head.weight.mul_(100)
        model.head.bias.zero_()
    one = figures(model, data, pgd(3), context(2))
    with torch.no_grad():
        model.head.weight.mul_(2)
    two = figures(model, data, pgd(3), context(2))
    assert two["gap_mean"].value == pytest.approx(2 * one["gap_mean"].value, rel=0.01)
    assert two["gap_relative"].value == pytest.approx(one["gap_relative"].value, rel=0.01)


def test_logits_that_are_not_finite_are_no_clean_accuracy() -> None:
    subject = PixelModel(linear_model(64, 3))
    with torch.no_grad():
        subject.model.head.bias[0] = torch.nan
    with pytest.raises(DataError, match="NaN or inf on clean images"):
        measure(subject, TASK.images("valid"), [Accuracy()], Context(gen(), Threat("Linf", 8)))


def test_a_figure_says_how_it_was_measured() -> None:
    measured = figures(
        linear_model(64, 3), TASK.images("valid"), pgd(2),
        context(8, card={"split": "valid"}),
    )  # fmt: skip
    protocol = measured["pgd2"].protocol
    wanted = {"split": "valid", "attack": "pgd", "norm": "Linf", "radius_px": 8, "steps": 2}
    assert wanted.items() <= protocol.items()


def test_a_batch_is_the_same_attacked_image_by_image() -> None:
    model, data = toy_model(TASK).eval(), TASK.images("valid")
    logits = model(2 * data.unit() - 1).logits
    each = torch.cat([model(2 * x - 1).logits for x in data.unit().split(1)])
    torch.testing.assert_close(logits, each, rtol=1e-4, atol=1e-5)


def test_progress_is_reported_to_the_last_image() -> None:
    messages: list[tuple[int, int]] = []
    ctx = context(batch_size=16, progress=lambda what, done, total: messages.append((done, total)))
    figures(linear_model(64, 3), TASK.images("valid"), Accuracy(), ctx)
    assert messages == [(16, 40), (32, 40), (40, 40)]


@pytest.mark.parametrize(("accuracy", "classes", "near"), [
    (0.5, 2, True), (0.54, 2, True), (0.7, 2, False), (0.39, 3, True), (0.45, 3, False),
    (0.14, 10, True), (0.16, 10, False), (0.014, 100, True), (0.016, 100, False),
])  # fmt: skip
def test_an_accuracy_is_near_that_of_a_guess(accuracy: float, classes: int, near: bool) -> None:
    assert near_chance(accuracy, classes) is near
