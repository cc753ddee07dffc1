"""PGD that stops at an image's fall, restart by restart: as many fall, for fewer passes."""

from collections.abc import Mapping

import pytest
import torch
from adversary_tools import data, judged, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import Generator, Tensor
from toys import gen, linear_model

from jemkit import PGD
from jemkit.attack import Perturb, Threat, drawn_start
from jemkit.data import Images
from jemkit.departures import departures
from jemkit.errors import DataError
from jemkit.falling import first_to_fall
from jemkit.pixels import UNIT, PixelModel
from jemkit.sampling import Projected

THREATS = [Threat("Linf", 40), Threat("Linf", 60), Threat("L2", 255)]
few = settings(max_examples=10, deadline=None)


def bound(attack: PGD, subject: PixelModel, threat: Threat) -> Perturb:
    (perturb,) = attack.bind(subject, threat).values()
    return perturb


def names(attack: PGD) -> list[str]:
    return list(attack.bind(trained(), Threat("Linf", 8)))


def right(subject: PixelModel, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = subject(x).argmax(1) == y
    return found


@few
@given(steps=st.integers(0, 6), threat=st.sampled_from(THREATS))
def test_from_one_start_the_same_images_fall(steps: int, threat: Threat) -> None:
    worst, first = (
        judged(trained(), PGD(steps=steps, keep=keep), data(), threat)
        for keep in ("worst", "first")
    )
    assert torch.equal(worst.right, first.right)
    assert worst.label == first.label
    assert worst.stages == first.stages
    assert (worst.protocol["kept"], first.protocol["kept"]) == (
        "the worst of all steps",
        "the first that falls, else the last",
    )


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_from_several_starts_about_as_many_fall(threat: Threat) -> None:
    """Not the same ones: whoever else stands decides on a row's noise."""
    subject, images = trained(), data(60)
    one = judged(subject, PGD(steps=4, keep="first"), images, threat)
    worst, first = (
        judged(subject, PGD(steps=4, restarts=5, keep=keep), images, threat)
        for keep in ("worst", "first")
    )
    after = list(first.stages.values())
    assert after[0] == one.stages["pgd4"]
    assert after == sorted(after, reverse=True)
    assert after[-1] == int(first.right.sum()) / len(images.y)
    assert abs(int(first.right.sum()) - int(worst.right.sum())) <= 3
    assert first.label == worst.label == "pgd4x5"


def test_each_restart_is_a_stage_with_a_name_of_its_own() -> None:
    several = PGD(steps=4, restarts=3, keep="first")
    assert names(several) == ["pgd4x3 restart 1", "pgd4x3 restart 2", "pgd4x3 restart 3"]
    assert names(PGD(steps=4, keep="first")) == ["pgd4"]
    assert names(PGD(steps=4, restarts=3)) == ["pgd4x3"]
    found = judged(trained(), several, data())
    assert list(found.protocol["accuracy_after"]) == names(several)


@few
@given(seed=seeds, sizes=st.lists(st.integers(1, 3), min_size=4, max_size=4))
def test_no_restart_begins_where_another_did_however_the_batches_are_made_up(
    seed: int, sizes: list[int]
) -> None:
    x, y = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.int64)
    stages = PGD(steps=0, restarts=4, keep="first").bind(trained(), Threat("Linf", 8))
    drawn = [
        climb(x[:n], y[:n], gen(seed)) for n, climb in zip(sizes, stages.values(), strict=True)
    ]
    rows = torch.cat(drawn).flatten(1)
    assert len(rows.unique(dim=0)) == sum(sizes)
    again = [
        climb(x[:n], y[:n], gen(seed)) for n, climb in zip(sizes, stages.values(), strict=True)
    ]
    assert all(map(torch.equal, drawn, again))
    kernel = PGD().kernel(x[: sizes[0]], 8, UNIT, "Linf")
    assert torch.equal(drawn[0], drawn_start(kernel, gen(seed)))  # where keep = "worst" begins


class Watched(PGD):
    """Notes the images of every batch of every stage."""

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        def noting(stage: str, climb: Perturb) -> Perturb:
            def perturb(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
                SEEN.setdefault(stage, []).append(x)
                return climb(x, y, rng)

            return perturb

        return {name: noting(name, climb) for name, climb in super().bind(subject, threat).items()}


SEEN: dict[str, list[Tensor]] = {}


def test_what_stands_a_restart_fills_the_batches_of_the_next() -> None:
    SEEN.clear()
    images, attack = data(), Watched(steps=1, restarts=3, keep="first")
    found = judged(trained(), attack, images, Threat("Linf", 40))
    standing = [len(images.y), *(round(v * len(images.y)) for v in found.stages.values())]
    assert 20 < standing[1] < standing[0]
    for name, n in zip(names(attack), standing, strict=False):
        assert [len(x) for x in SEEN[name]] == [20] * (n // 20) + [n % 20] * bool(n % 20)


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
    subject, steps = trained(), 5
    whole, worst, y = counted(subject, PGD(steps=steps), threat)
    passes, x_adv, _ = counted(subject, PGD(steps=steps, keep="first"), threat)
    assert whole == [len(y)] * (steps + 1)
    assert passes == sorted(passes, reverse=True)
    stand = int(right(subject, worst, y).sum())
    assert passes[0] == len(y)
    assert sum(passes) >= stand * (steps + 1)
    assert sum(passes) < sum(whole)
    assert int(right(subject, x_adv, y).sum()) == stand
    if stand:
        assert passes[-1] >= stand
        assert len(passes) == len(whole)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_a_batch_that_shrinks_by_the_grain_finds_the_same(threat: Threat) -> None:
    """A GPU's batches keep some that have fallen, and have few sizes."""
    subject, images, sizes = trained(), data(), list[int]()
    norm = "L2" if threat.norm == "L2" else "Linf"

    def around(x: Tensor) -> Projected:
        return PGD().kernel(x, threat.radius_px, UNIT, norm)

    def found(grain: int) -> Tensor:
        x, rng = images.unit(), gen()
        start = drawn_start(around(x), rng)
        return first_to_fall(
            subject, x, images.y, rng, start=start, kernel=around, steps=5, grain=grain
        )

    fine = found(1)
    handle = subject.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    coarse = found(8)
    handle.remove()
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-6)
    assert set(sizes) <= {len(images.y), *range(8, len(images.y), 8)}
    assert len(set(sizes)) > 1


def test_images_that_are_wrong_from_the_start_are_in_the_first_stage_alone() -> None:
    """They count as wrong, and make one pass there where their beginning is wrong."""
    subject, passes = PixelModel(linear_model(4, 2), UNIT), list[int]()
    x = torch.rand((6, 1, 2, 2), generator=gen())
    with torch.no_grad():
        y = subject(x).argmax(1)
    wrong = torch.tensor([True, False, True, False, False, True])
    subject.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    attack = PGD(steps=2, restarts=3, keep="first")
    found = judged(subject, attack, Images(x, y ^ wrong), Threat("Linf", 0))
    first, later = [6, 3, 3], [3, 3, 3]  # two steps and the end
    assert passes == [1, 6, *first, 6, *later, 3, *later, 3]  # classes, clean ones, verdicts
    assert torch.equal(found.right, ~wrong)
    assert set(found.stages.values()) == {0.5}
    assert torch.equal(found.x_adv, x)


def test_a_loss_that_is_nan_is_told() -> None:
    model = linear_model(4, 2)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.tensor([1, 1, 1])
    for steps in (0, 2):
        attack = bound(PGD(steps=steps, keep="first"), PixelModel(model, UNIT), Threat("Linf", 8))
        with pytest.raises(DataError, match="NaN"):
            attack(x, y, gen())


def test_a_figure_of_such_an_attack_says_that_it_is_not_the_usual_one() -> None:
    threat = Threat("Linf", 8.0)
    assert not departures(PGD(), threat)
    assert departures(PGD(keep="first"), threat) == {"keep": "first"}
    assert PGD(keep="first").card(threat, 10)["kept"] == "the first that falls, else the last"
