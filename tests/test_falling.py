"""PGD that stops at an image's fall: the same images fall, for fewer passes."""

import pytest
import torch
from adversary_tools import data, judged, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import gen, linear_model

from jemkit import PGD
from jemkit.attack import Perturb, Threat
from jemkit.errors import DataError
from jemkit.pixels import UNIT, PixelModel

THREATS = [Threat("Linf", 40), Threat("Linf", 60), Threat("L2", 255)]
few = settings(max_examples=10, deadline=None)


def bound(attack: PGD, subject: PixelModel, threat: Threat) -> Perturb:
    (perturb,) = attack.bind(subject, threat).values()
    return perturb


def right(subject: PixelModel, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = subject(x).argmax(1) == y
    return found


@few
@given(steps=st.integers(0, 6), restarts=st.integers(1, 3), threat=st.sampled_from(THREATS))
def test_the_same_images_fall(steps: int, restarts: int, threat: Threat) -> None:
    subject, images = trained(), data()
    worst, first = (
        judged(subject, PGD(steps=steps, restarts=restarts, keep=keep), images, threat)
        for keep in ("worst", "first")
    )
    assert torch.equal(worst.right, first.right)
    assert worst.label == first.label
    assert (worst.protocol["kept"], first.protocol["kept"]) == (
        "the worst of all steps",
        "the first that falls, else the last",
    )


def counted(subject: PixelModel, attack: PGD, threat: Threat) -> tuple[list[int], Tensor, Tensor]:
    """Images of each pass, and where they end."""
    images, passes = data(), list[int]()
    handle = subject.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    x_adv = bound(attack, subject, threat)(images.unit(), images.y, gen())
    handle.remove()
    return passes, x_adv, images.y


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_what_has_fallen_is_passed_no_more(threat: Threat) -> None:
    """Each image makes as many passes as it takes to fall; one that stands makes them all."""
    subject, steps, restarts = trained(), 5, 3
    whole, worst, y = counted(subject, PGD(steps=steps, restarts=restarts), threat)
    passes, x_adv, _ = counted(subject, PGD(steps=steps, restarts=restarts, keep="first"), threat)
    assert whole == [len(y)] * restarts * (steps + 1)
    assert passes == sorted(passes, reverse=True)
    stand = int(right(subject, worst, y).sum())
    assert passes[0] == len(y)
    assert sum(passes) >= stand * restarts * (steps + 1)
    assert sum(passes) < sum(whole)
    assert int(right(subject, x_adv, y).sum()) == stand
    if stand:
        assert passes[-1] >= stand
        assert len(passes) == len(whole)


def test_an_image_that_is_wrong_from_the_start_takes_one_pass() -> None:
    model = linear_model(4, 2)
    x = torch.full((3, 1, 2, 2), 0.5)
    subject, passes = PixelModel(model, UNIT), list[int]()
    with torch.no_grad():
        y = 1 - subject(x).argmax(1)
    subject.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    attack = PGD(steps=9, restarts=4, keep="first")
    x_adv = bound(attack, subject, Threat("Linf", 0))(x, y, gen())
    assert passes == [3]
    assert torch.equal(x_adv, x)


def test_a_loss_that_is_nan_is_told() -> None:
    model = linear_model(4, 2)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.tensor([1, 1, 1])
    for steps in (0, 2):
        attack = bound(PGD(steps=steps, keep="first"), PixelModel(model, UNIT), Threat("Linf", 8))
        with pytest.raises(DataError, match="NaN"):
            attack(x, y, gen())
