"""The driver of attacks: what a kill, a shard or a broken attack may and may not do to a figure."""

from pathlib import Path

import pytest
import torch
from attack_runs import CALLS, DATA, THREAT, Noisy, run, toy_subject
from torch import Tensor, nn
from toys import gen

from jemkit.attacks.pgd import PGD
from jemkit.attacks.pixel_model import PixelModel, pixel_model
from jemkit.data import Images
from jemkit.errors import DataError, MisfitError
from jemkit.metrics.attack_runner import attacked
from jemkit.metrics.evaluator import Context
from jemkit.runtime.modes import eval_mode, frozen


def test_an_attack_says_how_far_it_is_within_a_batch() -> None:
    messages: list[tuple[str, int, int]] = []
    ctx = Context(gen(), THREAT, batch_size=5, progress=lambda *what: messages.append(what))
    attacked(toy_subject().eval(), PGD(steps=3), DATA, ctx, "pgd")
    total = len(DATA.y)
    assert messages.count(("pgd3", 0, total)) >= 3
    assert [done for _, done, _ in messages] == sorted(done for _, done, _ in messages)
    assert messages[-1] == ("pgd3", total, total)


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    run(work=tmp_path)
    assert torch.equal(state, torch.get_rng_state())


def right_at_first(subject: PixelModel) -> Tensor:
    with frozen(subject), eval_mode(subject), torch.no_grad():
        return subject(DATA.unit()).argmax(1) == DATA.y


def test_images_that_are_wrong_already_are_never_attacked() -> None:
    subject = toy_subject()
    right = right_at_first(subject)
    assert 0 < int(right.sum()) < len(right)
    CALLS.clear()
    outcome = run(subject, Noisy(share=0))
    recorded = torch.cat(CALLS)
    expected = DATA.unit()[right]
    assert torch.equal(recorded, torch.cat([expected, expected]))  # in both stages, since none fell
    assert torch.equal(outcome.right, right)
    assert torch.equal(outcome.x_adv, DATA.unit())


def test_an_attack_on_everyone_has_all_images_and_makes_none_right() -> None:
    subject = toy_subject()
    right = right_at_first(subject)
    outcome = run(subject, PGD(steps=2))
    assert not (outcome.right & ~right).any()
    moved = (outcome.x_adv != DATA.unit()).flatten(1).any(1)
    assert moved.all()


def test_a_stage_has_the_survivors_of_the_one_before() -> None:
    CALLS.clear()
    outcome = run(attack=Noisy(share=0.5), batch_size=100)
    assert len(CALLS) == 2
    assert len(CALLS[0]) > len(CALLS[1])
    assert len(CALLS[1]) == round(outcome.stages["first"] * len(DATA.y))
    assert outcome.stages["second"] == int(outcome.right.sum()) / len(DATA.y)


def test_a_fallen_image_is_the_one_that_is_returned() -> None:
    subject = toy_subject()
    outcome = run(subject)
    with frozen(subject), eval_mode(subject), torch.no_grad():
        again = subject(outcome.x_adv).argmax(1) == DATA.y
    assert torch.equal(again, outcome.right)
    assert not outcome.right.all()


def test_an_attack_that_leaves_its_ball_is_an_error(tmp_path: Path) -> None:
    grey = Images(torch.full((4, 1, 8, 8), 0.5), right_of(0.5, 4))
    for _ in range(2):  # nor does a piece of it remain
        with pytest.raises(MisfitError, match=r"noisy left its ball: .* 51\D.*radius 25.5/255"):
            run(attack=Noisy(share=0, push=0.2), data=grey, work=tmp_path)


def right_of(grey: float, n: int) -> Tensor:
    """The class that the toy gives a plain grey image."""
    subject = toy_subject()
    with frozen(subject), eval_mode(subject), torch.no_grad():
        return subject(torch.full((n, 1, 8, 8), grey)).argmax(1)


def test_pixels_outside_the_range_are_an_error() -> None:
    white = Images(torch.ones(4, 1, 8, 8), right_of(1.0, 4))
    with pytest.raises(MisfitError, match=r"pixels from 1\.05 to 1\.05; expected \[0, 1\]"):
        run(attack=Noisy(share=0, push=0.05), data=white)


class Fragile(nn.Module):
    """Logits that are NaN for images with a pixel that is not on the grid of k/255."""

    def __init__(self, *, clean: bool) -> None:
        super().__init__()
        self.clean = clean
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        off = ((x * 255 - (x * 255).round()).abs() > 1e-2).flatten(1).any(1, keepdim=True)
        out: Tensor = self.head(x.flatten(1)).masked_fill(off | self.clean, torch.nan)
        return out


@pytest.mark.parametrize("clean", [True, False])
def test_logits_that_are_not_finite_are_an_error(clean: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        subject = pixel_model(Fragile(clean=clean))
    with pytest.raises(DataError, match="NaN or inf on " + ("clean" if clean else "attacked")):
        run(subject, Noisy(share=0.77))
