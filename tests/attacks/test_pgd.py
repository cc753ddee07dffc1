"""Attacks stay in their ball, in the units of the person who sets it, and make things worse."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_sizes, radii_px, seeds, uniform
from torch import Tensor, nn
from toys import gen, linear_model

from jemkit import PGD, Backbone, Bounds, perturbed
from jemkit.attacks.pixel_model import PixelModel
from jemkit.testing import toy_model, toy_task
from jemkit.testing.law import state_of

TASK = toy_task()
norms = st.sampled_from(["Linf", "L2"])
ranges = st.sampled_from([Bounds(-1, 1), Bounds(0, 1), Bounds(-2, 3)])


def size(delta: Tensor, norm: str) -> Tensor:
    return delta.flatten(1).norm(2.0 if norm == "L2" else math.inf, dim=1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def flat_loss(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


@given(seed=seeds, n=batch_sizes, radius=radii_px, norm=norms, bounds=ranges)
def test_every_state_of_an_attack_is_in_the_ball_and_in_the_range(
    seed: int, n: int, radius: float, norm: str, bounds: Bounds
) -> None:
    model = linear_model(12, 3, seed % 100)
    x, y = bounds.from_unit(uniform(seed, n, 1, 3, 4, low=0)), torch.zeros(n, dtype=torch.int64)
    for steps in range(3):
        attack = PGD(steps=steps, norm=norm)
        x_adv = attack.draw(
            model, lambda z: cross_entropy(model(z).logits, y), x, gen(seed), bounds=bounds,
            radius_px=radius,
        )  # fmt: skip
        limit = bounds.px(radius)
        assert (size(x_adv - x, norm) <= limit * (1 + 1e-5) + 1e-6).all()
        assert x_adv.min() >= bounds.low
        assert x_adv.max() <= bounds.high
        assert not x_adv.requires_grad


def test_a_radius_in_pixels_is_the_same_share_of_any_range() -> None:
    for bounds, expected in ((Bounds(-1, 1), 16 / 255), (Bounds(0, 1), 8 / 255)):
        x = bounds.from_unit(torch.full((2, 1, 4, 4), 0.5))
        x_adv = PGD(steps=9).draw(nn.Identity(), flat_loss, x, gen(), bounds=bounds, radius_px=8)
        assert math.isclose(float((x_adv - x).abs().max()), expected, rel_tol=1e-5)
        assert math.isclose(bounds.px(8), expected)


class Normalised(nn.Module):
    """A classifier that scales each channel by itself, and keeps what it last saw."""

    def __init__(self, std: tuple[float, float, float]) -> None:
        super().__init__()
        self.std, self.last_input = torch.tensor(std).view(3, 1, 1), torch.empty(0)
        self.head = nn.Linear(3 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.last_input = (x - 0.4) / self.std
        out: Tensor = self.head(self.last_input.flatten(1))
        return out


def test_a_radius_in_pixels_reaches_a_normalising_model_divided_by_each_deviation() -> None:
    module = Normalised((0.2, 0.25, 0.5))
    settings = {"shape": (3, 2, 2), "n_classes": 3, "rng": gen(), "radius_px": 8}
    backbone = Backbone.of_module(module, bounds=Bounds(0, 1), **settings)
    x, y = torch.full((1, 3, 2, 2), 0.5), torch.tensor([0])
    model = backbone.model
    x_adv = PGD(steps=12).draw(
        model, lambda z: cross_entropy(model(z).logits, y), x, gen(), bounds=backbone.bounds,
        radius_px=backbone.radius_px,
    )  # fmt: skip
    model(x)
    clean = module.last_input
    model(x_adv)
    reached = (module.last_input - clean).abs().amax(dim=(0, 2, 3))
    torch.testing.assert_close(reached, 8 / 255 / module.std.flatten(), rtol=1e-4, atol=1e-5)


@given(seed=seeds)
def test_a_radius_of_zero_gives_the_images_back(seed: int) -> None:
    x = uniform(seed, 3, 1, 3, 4)
    for norm in ("Linf", "L2"):
        attack = PGD(steps=3, norm=norm)
        x_adv = attack.draw(nn.Identity(), flat_loss, x, gen(), bounds=Bounds(), radius_px=0)
        assert torch.equal(x_adv, x)


@given(seed=seeds, radius=st.floats(1, 30))
def test_on_a_linear_model_the_attack_reaches_the_corner_of_the_ball(
    seed: int, radius: float
) -> None:
    model = linear_model(12, 2, seed)
    x, y = uniform(seed, 3, 1, 3, 4, low=-0.5, high=0.5), torch.tensor([0, 1, 0])
    x_adv = PGD(steps=10).draw(
        model, lambda z: cross_entropy(model(z).logits, y), x, gen(seed), bounds=Bounds(),
        radius_px=radius,
    )  # fmt: skip
    w = model.head.weight
    up = torch.where(y[:, None] == 0, w[1] - w[0], w[0] - w[1])
    expected = x.flatten(1) + Bounds().px(radius) * up.sign()
    torch.testing.assert_close(x_adv.flatten(1), expected, rtol=0, atol=1e-5)


@given(seed=seeds)
def test_on_a_linear_model_the_l2_attack_walks_along_the_weights(seed: int) -> None:
    model = linear_model(12, 2, seed)
    x, y = uniform(seed, 3, 1, 3, 4, low=-0.2, high=0.2), torch.tensor([0, 1, 0])
    x_adv = PGD(steps=60, norm="L2").draw(
        model, lambda z: cross_entropy(model(z).logits, y), x, gen(seed), bounds=Bounds(),
        radius_px=20,
    )  # fmt: skip
    w = model.head.weight
    up = F.normalize(torch.where(y[:, None] == 0, w[1] - w[0], w[0] - w[1]), dim=1)
    moved = (x_adv - x).flatten(1)
    torch.testing.assert_close(moved.norm(dim=1), torch.full((3,), Bounds().px(20)))
    assert ((moved * up).sum(1) > 0.99 * moved.norm(dim=1)).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_clean_start_is_the_image_itself_and_draws_nothing(norm: str) -> None:
    model, x, rng = linear_model(12, 3), uniform(0, 4, 1, 3, 4), gen()
    y, before = torch.zeros(4, dtype=torch.int64), rng.get_state()
    settings = {"bounds": Bounds(-1, 1), "radius_px": 8}
    none, one = (
        PGD(steps=steps, norm=norm, start="clean").draw(
            model, lambda z: cross_entropy(model(z).logits, y), x, rng, **settings
        )
        for steps in (0, 1)
    )
    assert torch.equal(none, x)
    assert not torch.equal(one, x)
    assert torch.equal(rng.get_state(), before)
    assert "restarts" in PGD(start="clean").unused()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_odd_batches_and_single_images_are_attacked_too(n: int) -> None:
    model, y = toy_model(TASK), torch.arange(n) % 3
    x_adv = PGD(steps=3).draw(
        model, lambda z: cross_entropy(model(z).logits, y), uniform(0, n, *TASK.shape), gen(),
        bounds=Bounds(), radius_px=8,
    )  # fmt: skip
    assert x_adv.shape == (n, *TASK.shape)


def test_images_are_attacked_one_by_one_however_the_batch_is_made_up() -> None:
    model, y = toy_model(TASK).train(), torch.tensor([0, 1, 2])
    x = uniform(0, 3, *TASK.shape)
    other = torch.cat([x[:1], -x[1:]])

    def attacked(images: Tensor) -> Tensor:
        return PGD(steps=3).draw(
            model, lambda z: cross_entropy(model(z).logits, y), images, gen(), bounds=Bounds(),
            radius_px=8,
        )  # fmt: skip

    torch.testing.assert_close(attacked(x)[0], attacked(other)[0], rtol=0, atol=1e-5)


def test_an_attack_leaves_the_model_and_a_leaf_alone() -> None:
    model = toy_model(TASK).train()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = state_of(model)
    x = uniform(0, 3, *TASK.shape).requires_grad_()
    PGD(steps=2).draw(
        model, lambda z: model(z).energy, x, gen(), bounds=Bounds(), radius_px=8
    )  # fmt: skip
    after = state_of(model)
    assert before["modes"] == after["modes"]
    assert all(torch.equal(before["tensors"][n], t) for n, t in after["tensors"].items())
    assert torch.equal(after["grads"]["network.first.weight"], torch.ones_like(first))
    assert x.grad is None


@given(seed=seeds, norm=norms, radius=st.floats(0.01, 1))
def test_a_perturbation_is_uniform_in_its_ball(seed: int, norm: str, radius: float) -> None:
    x = torch.zeros(2000, 1, 2, 2)
    delta = perturbed(x, radius, gen(seed), norm)
    length = size(delta, norm)
    assert (length <= radius * (1 + 1e-5)).all()
    assert float(length.max()) > 0.98 * radius
    # half the volume of a ball of 4 dimensions lies within 0.5 ** (1 / 4) of its radius
    share = float((length < 0.5**0.25 * radius).float().mean())
    assert abs(share - 0.5) < 0.06
    assert float(delta.mean(0).abs().max()) < 0.08 * radius


def test_pixels_go_to_any_range_and_back() -> None:
    u = uniform(0, 50, low=0)
    for bounds in (Bounds(), Bounds(0, 1), Bounds(-2, 3)):
        torch.testing.assert_close(bounds.to_unit(bounds.from_unit(u)), u)
        assert bounds.px(255) == bounds.high - bounds.low
    subject = PixelModel(linear_model(50, 3), Bounds())
    inside = subject.model(2 * u.view(1, 50) - 1).logits
    torch.testing.assert_close(subject(u.view(1, 50)), inside)
    assert Bounds().clamp(torch.tensor([-3.0, 3.0])).tolist() == [-1, 1]


@pytest.mark.parametrize("field", ["steps", "radius_px", "step_px"])
def test_sizes_below_zero_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        PGD(**{field: -1})
