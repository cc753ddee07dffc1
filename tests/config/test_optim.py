"""The learning rate is a pure function of the step."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from jemkit.config.optim import SGD, Adam, Schedule

decays = st.sampled_from(["constant", "steps", "cosine"])


@given(decay=decays, total=st.integers(1, 3000), warmup=st.integers(0, 2000))
def test_every_step_has_a_rate_above_zero_and_no_more_than_the_whole(
    decay: str, total: int, warmup: int
) -> None:
    schedule = Schedule(decay=decay, warmup=warmup)
    for step in {0, total // 3, total - 1}:
        assert 0 < schedule.factor(step, total) <= 1


@given(total=st.integers(100, 3000), warmup=st.integers(1, 50), decay=decays)
def test_warm_up_rises_by_equal_parts_and_wastes_no_step(
    total: int, warmup: int, decay: str
) -> None:
    schedule = Schedule(decay=decay, warmup=warmup, warmup_share=1)
    rates = [schedule.factor(step, total) for step in range(warmup)]
    assert rates == pytest.approx([(i + 1) / warmup for i in range(warmup)])


def test_warm_up_ends_at_the_share_or_at_its_steps_whichever_comes_first() -> None:
    long, short = Schedule(decay="constant"), Schedule(decay="constant", warmup=10)
    assert [long.factor(s, 100) for s in (0, 3, 4, 5)] == [0.2, 0.8, 1, 1]  # 5 % of 100 steps
    assert long.factor(998, 100_000) < 1 == long.factor(999, 100_000)
    assert short.factor(8, 1000) < 1 == short.factor(9, 1000)
    assert Schedule(warmup=0).factor(0, 10) == 1


def test_steps_fall_at_their_shares() -> None:
    schedule = Schedule(decay="steps", warmup=0, at=(0.5, 0.75), by=0.1)
    factors = [schedule.factor(step, 100) for step in (0, 49, 50, 74, 75, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@given(total=st.integers(2, 500), floor=st.floats(0, 1))
def test_a_cosine_falls_from_one_to_its_floor(total: int, floor: float) -> None:
    schedule = Schedule(decay="cosine", warmup=0, floor=floor)
    rates = [schedule.factor(step, total) for step in range(total + 1)]
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert (rates[0], rates[-1]) == pytest.approx((1, floor))
    if total % 2 == 0:
        assert math.isclose(rates[total // 2], (1 + floor) / 2, abs_tol=1e-9)


@given(decay=decays, cut=st.integers(0, 100))
def test_a_run_that_is_cut_and_resumed_has_the_rates_of_one_that_is_not(
    decay: str, cut: int
) -> None:
    schedule = Schedule(decay=decay)
    whole = [schedule.factor(step, 100) for step in range(100)]
    again = Schedule(decay=decay)  # as a new process would read it
    assert whole[:cut] + [again.factor(step, 100) for step in range(cut, 100)] == whole


@pytest.mark.parametrize(("options", "kind"), [
    (SGD(lr=0.3, momentum=0.5, weight_decay=0.1), torch.optim.SGD),
    (Adam(lr=0.3), torch.optim.Adam),
    (Adam(use="adamw", weight_decay=0.1), torch.optim.AdamW),
])  # fmt: skip
def test_optimizers_are_built_with_their_options(
    options: SGD | Adam, kind: type[torch.optim.Optimizer]
) -> None:
    built = options.build(nn.Linear(2, 2).parameters(), fused=False)
    assert type(built).__bases__ == (kind,)
    for name, value in options.model_dump(exclude={"use", "decay_norms"}).items():
        assert built.param_groups[0][name] == value


@pytest.mark.parametrize("ours", [SGD(lr=0.1), Adam(lr=0.1), Adam(use="adamw", lr=0.1)])
def test_an_optimizer_is_torchs_own_and_steps_like_it(ours: SGD | Adam) -> None:
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[ours.use]
    same = ours.model_dump(exclude={"use", "decay_norms"})
    ends = []
    for build in (lambda p: ours.build(p, fused=False), lambda p: kind(p, **same)):
        weight = nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = build([weight])
        for _ in range(3):
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()
        ends.append((weight.detach(), optimizer.state_dict()["param_groups"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("part", [SGD, Adam])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_rates_that_float32_cannot_hold_are_refused(
    part: type[SGD] | type[Adam], name: str
) -> None:
    with pytest.raises(ValidationError, match=name):
        part.model_validate({name: 1e308})
