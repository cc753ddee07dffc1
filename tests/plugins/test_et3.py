"""ET3: steps down the energy by hand, in the ball; attacks through the defence and past it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adversary_tools import LINF, data, trained
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, uniform
from torch import Tensor
from toys import gen, linear_model

from jemkit import PGD, Context, PixelModel, Threat, Unmeasurable, evaluate
from jemkit.attacks.pixel_model import UNIT, ZeroGradientModel
from jemkit.attacks.purification import Refinement, refined
from jemkit.metrics.attack_runner import attacked
from jemkit.metrics.evaluator import measure
from jemkit.metrics.figures import Figure
from jemkit.runtime.modes import frozen
from jemkit_plugins.et3 import ET3, Descended


def linear(seed: int = 0) -> PixelModel:
    return PixelModel(linear_model(12, 3, seed).double(), UNIT)


def defended(subject: PixelModel, radius: float = 51, **options: Any) -> Descended:
    spec = ET3(**{"steps": 1, **options})
    return Descended(subject, spec, radius, "L2" if spec.direction == "l2" else "Linf")


def images_of(seed: int, n: int = 4) -> Tensor:
    return uniform(seed, n, 1, 3, 4, low=0.3, high=0.7).double()


def energy(subject: PixelModel, x: Tensor) -> Tensor:
    return -subject.scores(x).logits.logsumexp(1)


def two_pixels() -> PixelModel:
    """Logits 2 a and -a of the first pixel a; the second changes nothing."""
    model = linear_model(2, 2).double()
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[2.0, 0.0], [-1.0, 0.0]]))
        model.head.bias.zero_()
    return PixelModel(model, UNIT)


@pytest.mark.parametrize("direction", ["sign", "l2"])
def test_one_step_by_hand(direction: str) -> None:
    x = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    moved = defended(two_pixels(), direction=direction).descend(x)  # log(e^2a + e^-a) rises with a
    torch.testing.assert_close(moved.flatten(), torch.tensor([0.7, 0.5], dtype=torch.float64))


def test_what_it_classifies_is_the_end_of_the_steps() -> None:
    subject, x = linear(), images_of(3)
    model = defended(subject, steps=2)
    assert torch.equal(model(x), subject(model.descend(x)))
    assert not torch.equal(model(x), subject(x))


@given(seed=seeds, steps=st.integers(0, 3), direction=st.sampled_from(["sign", "l2"]))
def test_it_stays_in_its_ball_and_in_the_range(seed: int, steps: int, direction: str) -> None:
    x = uniform(seed, 3, 1, 3, 4, low=0, high=1).double()
    options = {"steps": steps, "step_px": 40, "direction": direction}
    moved = defended(linear(seed % 9), radius=51, **options).descend(x)
    size = (moved - x).flatten(1).norm(torch.inf if direction == "sign" else 2, dim=1)
    assert (size <= 51 / 255 + 1e-9).all()
    assert moved.min() >= 0
    assert moved.max() <= 1
    if not steps:
        assert torch.equal(moved, x)


@given(seed=seeds)
def test_small_steps_go_down_the_energy(seed: int) -> None:
    subject, x = linear(seed % 9), images_of(seed)
    moved = defended(subject, radius=2, steps=2).descend(x)
    assert (energy(subject, moved) < energy(subject, x)).all()


@pytest.mark.parametrize("direction", ["sign", "l2"])
def test_without_a_gradient_an_image_stays(direction: str) -> None:
    subject, x = linear(), images_of(0)
    with torch.no_grad():
        subject.model.head.weight.zero_()  # type: ignore[union-attr]
    assert torch.equal(defended(subject, direction=direction).descend(x), x)


def test_each_image_moves_by_itself_and_in_the_models_mode() -> None:
    subject, images = trained(), data(6).unit()
    whole = defended(subject, steps=2).descend(images)
    for i in range(6):
        alone = defended(subject, steps=2).descend(images[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1], atol=1e-5, rtol=0)


def slope_of(model: PixelModel, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    with frozen(model):
        (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return slope


@pytest.mark.parametrize("direction", ["sign", "l2"])
def test_an_attack_sees_the_gradient_through_the_defence(direction: str) -> None:
    model, x, y = (
        defended(linear(), direction=direction, radius=20),
        images_of(1),
        torch.arange(4) % 3,
    )
    way = uniform(7, 4, 1, 3, 4).double()
    h = 1e-5
    with torch.no_grad():
        ends = [F.cross_entropy(model(x + s * h * way), y, reduction="none") for s in (1, -1)]
    slope = (slope_of(model, x, y) * way).flatten(1).sum(1)
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=1e-7)


def test_the_gradient_through_a_sign_is_that_at_the_end_and_not_the_models_own() -> None:
    subject, x, y = linear(), images_of(1), torch.arange(4) % 3
    model = defended(subject, radius=20)
    torch.testing.assert_close(slope_of(model, x, y), slope_of(subject, model.descend(x), y))
    assert not torch.allclose(slope_of(model, x, y), slope_of(subject, x, y))


def figures(threat: Threat = LINF, **options: Any) -> dict[str, Figure]:
    context = Context(gen(), threat, batch_size=20, attacks={"pgd": PGD(steps=5)})
    spec = ET3(**{"steps": 2, **options})
    return {f.name: f for f in measure(trained(), data(), [spec], context)}


def test_every_figure_says_what_was_attacked_and_none_is_standard() -> None:
    measured = figures()
    assert list(measured) == ["et3", "et3/pgd5", "et3/pgd5/oblivious"]
    for figure in measured.values():
        assert figure.protocol["standard"] is False
        assert "lowers the energy of its input by 2 steps (et3)" in figure.protocol["why"]
        assert figure.protocol["defence"]["radius_px"] == 40
    assert measured["et3/pgd5"].protocol["attacked"].startswith("with its defence, and without it")
    past = measured["et3/pgd5/oblivious"].protocol
    assert past["attacked"] == "without its defence"
    assert "the attack ignores the defence" in past["why"]
    assert "ignores" not in measured["et3/pgd5"].protocol["why"]


def test_an_image_is_robust_if_it_withstands_both_attacks() -> None:
    """Here the defence hides the gradient: an attack through it finds less than one past it."""
    measured = figures()
    assert measured["et3/pgd5"].value <= measured["et3/pgd5/oblivious"].value
    assert measured["et3/pgd5"].value < measured["et3"].value
    model = defended(trained(), radius=40, steps=2)
    context = Context(gen(), LINF, batch_size=20)
    alone = attacked(model, PGD(steps=5), data(), context, "pgd").right
    assert int(alone.sum()) / 45 > measured["et3/pgd5"].value


def test_it_runs_only_on_demand() -> None:
    with pytest.raises(Unmeasurable, match=r"set et3.steps to 1 or 2"):
        figures(steps=0)
    assert set(ET3().unused()) == {"radius_px", "step_px", "direction"}
    record = evaluate(trained(), data(9), n_classes=3, attacks=("pgd",), eps_px=40, max_images=9,
                      options={"pgd": {"steps": 1}})  # fmt: skip
    assert "no test-time defence" in record.left_out["et3"]


def test_it_is_measured_on_a_model_itself_in_norms_that_it_has() -> None:
    with pytest.raises(Unmeasurable, match="not of L1"):
        figures(Threat("L1", 255.0))
    context = Context(gen(), LINF, batch_size=20, attacks={"pgd": PGD(steps=1)})
    for other in (refined(trained(), Refinement(steps=1)), ZeroGradientModel(trained())):
        with pytest.raises(Unmeasurable, match="neither with --refine-steps, nor on"):
            measure(other, data(), [ET3(steps=1)], context)
