"""The multi-targeted attack keeps the laws of attacks and its ball, and finds what can fall."""

import pytest
import torch
from jemkit import MisfitError, Norm, Threat
from jemkit.testing import CHECKS
from torch import Generator, Tensor, nn

from jemkit_multitargeted import MultiTargeted, towards


def test_it_keeps_the_laws_of_its_kind() -> None:
    CHECKS["attack"](MultiTargeted(steps=5))


class Planes(nn.Module):
    """Class k's logit is a fixed linear function of the pixels; counts the images it sees."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights, self.seen = weights, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x.flatten(1) @ self.weights.T


def attacked(
    model: Planes, attack: MultiTargeted, x: Tensor, y: Tensor, norm: Norm, px: float
) -> Tensor:
    (stage,) = attack.bind(model, Threat(norm, px)).values()
    return stage(x, y, Generator().manual_seed(0))


@pytest.fixture
def planes() -> tuple[Planes, Tensor, Tensor]:
    rng = Generator().manual_seed(0)
    model = Planes(torch.randn((5, 16), generator=rng))
    x = torch.rand((32, 1, 4, 4), generator=rng)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize(("norm", "px", "order"), [("Linf", 8.0, torch.inf), ("L2", 40.0, 2.0)])
def test_it_stays_in_the_ball_and_in_the_range(
    planes: tuple[Planes, Tensor, Tensor], norm: Norm, px: float, order: float
) -> None:
    model, x, y = planes
    x_adv = attacked(model, MultiTargeted(), x, y, norm, px)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    sizes = (x_adv - x).flatten(1).norm(order, dim=1)
    assert sizes.max() <= px / 255 + 1e-6
    assert sizes.max() > 0.99 * px / 255


def test_l1_is_refused(planes: tuple[Planes, Tensor, Tensor]) -> None:
    with pytest.raises(MisfitError, match="mt20 supports the norms Linf and L2"):
        MultiTargeted().bind(planes[0], Threat("L1", 3060.0))


def test_on_a_linear_model_it_finds_every_image_that_can_fall(
    planes: tuple[Planes, Tensor, Tensor],
) -> None:
    """In L-inf the best x~ towards a class is a corner of the ball, cut by the range."""
    model, x, y = planes
    x_adv = attacked(model, MultiTargeted(), x, y, "Linf", 20.0)
    found = model(x_adv).argmax(1) != y
    eps, possible = 20.0 / 255, torch.zeros(len(x), dtype=torch.bool)
    for t in range(5):
        ahead = (model.weights[t] - model.weights[y]).view_as(x)
        corner = (x + eps * ahead.sign()).clamp(0, 1)
        possible |= model(corner).argmax(1) != y
    assert 0 < int(possible.sum()) < len(x)
    assert torch.equal(found, possible)


def test_only_what_still_stands_is_attacked_again(planes: tuple[Planes, Tensor, Tensor]) -> None:
    model, x, y = planes
    counts = {}
    for px in (0.001, 200.0):  # nothing falls; nearly all falls towards the first class
        model.seen = 0
        attacked(model, MultiTargeted(steps=3), x, y, "Linf", px)
        counts[px] = model.seen
    assert counts[0.001] == len(x) + 4 * (len(x) + 4 * len(x))
    assert counts[200.0] < counts[0.001] / 2


def test_fewer_targets_are_a_weaker_attack(planes: tuple[Planes, Tensor, Tensor]) -> None:
    model, x, y = planes
    one, all_of_them = (
        attacked(model, MultiTargeted(targets=n), x, y, "Linf", 20.0) for n in (1, None)
    )
    still = [int((model(z).argmax(1) == y).sum()) for z in (one, all_of_them)]
    assert still[1] <= still[0]


def test_its_protocol_names_loss_and_targets() -> None:
    card = MultiTargeted(targets=9).card(Threat("Linf", 8.0), n_classes=5)
    assert (card["loss"], card["targets"], card["step_px"]) == ("z_t - z_y", 4, 2.0)
    assert MultiTargeted(steps=10, restarts=2).label == "mt10x2"


def test_the_criterion_is_the_lead_of_the_target(planes: tuple[Planes, Tensor, Tensor]) -> None:
    model, x, y = planes
    target = (y + 1) % 5
    loss, wrong, _ = towards(model, target, y)(x)
    z = model(x)
    rows = torch.arange(len(x))
    torch.testing.assert_close(loss, z[rows, target] - z[rows, y])
    assert not wrong.any()
