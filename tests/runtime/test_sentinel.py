"""What the sentinel takes for divergence in a run's metrics, and what for health."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from toys import backbone_of, toy_recipe, toy_registry

from jemkit import ConfigError
from jemkit.runtime.divergence_monitor import Drift, Finding, RunStatistics, Sentinel
from jemkit.testing import toy_task
from jemkit.training.health import edge_limit, renew, unfit, unhealthy_slots

names = st.sampled_from(["loss", "loss p(x)", "E(x+)", "gap x+ x-", "gradient norm", "accuracy"])
scales = st.floats(-6, 6).map(lambda power: 2.0 ** round(3 * power))


def first(options: Sentinel, values: list[float]) -> int | None:
    """The step at which a drift is found."""
    drift = Drift(options)
    return next((step for step, value in enumerate(values) if drift.reads(step, value)), None)


def exploding(seed: int, at: int = 100, steps: int = 200) -> list[float]:
    noise = normal(seed, steps, dtype=torch.float64)
    growth = torch.arange(steps, dtype=torch.float64).sub(at).clamp(min=0).div(3).exp2() - 1
    return (noise + growth).tolist()


@given(name=names, value=st.sampled_from([math.nan, math.inf, -math.inf]), at=st.integers(0, 90))
def test_whatever_is_not_finite_is_a_finding_at_once(name: str, value: float, at: int) -> None:
    statistics = RunStatistics(Sentinel())
    rows: list[dict[str, Any]] = [{"step": i, "lr": 0.1, name: float(i % 3)} for i in range(at)]
    assert not any(statistics.row(row) for row in rows)
    finding = statistics.row({"step": at, "lr": 0.1, name: value})
    assert finding == Finding(name, at, f"not finite: {name} = {value}")


@given(seed=seeds, scale=scales, offset=st.floats(-1e3, 1e3))
def test_noise_of_any_scale_and_offset_is_healthy(seed: int, scale: float, offset: float) -> None:
    values = scale * (normal(seed, 400, dtype=torch.float64) + offset)
    assert first(Sentinel(nats=0), values.tolist()) is None
    assert first(Sentinel(), values.tolist()) is None


@given(seed=seeds, scale=scales, offset=st.floats(-1e3, 1e3))
def test_the_rule_of_the_gap_is_the_same_for_a_gap_scaled_and_shifted(
    seed: int, scale: float, offset: float
) -> None:
    values = exploding(seed)
    moved = [scale * (value + offset) for value in values]
    step = first(Sentinel(nats=0), values)
    assert step is not None
    assert first(Sentinel(nats=0), moved) == step


@given(seed=seeds, sign=st.sampled_from([-1, 1]), at=st.integers(25, 150))
def test_a_gap_that_explodes_is_a_finding_within_ten_steps_of_a_hundred_nats(
    seed: int, sign: int, at: int
) -> None:
    values = [sign * value for value in exploding(seed, at)]
    crossed = next(step for step, value in enumerate(values) if abs(value) > 110)
    alarm = first(Sentinel(), values)
    assert alarm is not None
    assert at < alarm <= crossed + 10


@given(seed=seeds, at=st.integers(0, 399), size=st.floats(1e3, 1e12))
def test_one_outlier_alone_is_not_a_sickness(seed: int, at: int, size: float) -> None:
    values = normal(seed, 400, dtype=torch.float64).tolist()
    values[at] = size
    assert first(Sentinel(), values) is None


@given(seed=seeds, cut=st.integers(1, 140))
def test_a_sentinel_that_is_saved_and_loaded_finds_the_same(seed: int, cut: int) -> None:
    values, rows = exploding(seed), []
    rows = [{"step": step, "gap x+ x-": value, "E(x)": -value} for step, value in enumerate(values)]
    whole, cut_short, later = (RunStatistics(Sentinel()) for _ in range(3))
    wanted = next(finding for finding in map(whole.row, rows) if finding)
    early = [cut_short.row(row) for row in rows[:cut]]
    if any(early):
        assert next(filter(None, early)) == wanted
        return
    later.load_state_dict(cut_short.state_dict())
    assert next(finding for finding in map(later.row, rows[cut:]) if finding) == wanted


@given(classes=st.integers(2, 100), images=st.integers(100, 5000))
def test_accuracy_at_chance_is_a_collapse_only_after_it_was_clearly_above(
    classes: int, images: int
) -> None:
    statistics, chance = RunStatistics(Sentinel()), 1 / classes

    def collapsed(*history: float) -> bool:
        return statistics.accuracy(history, chance, images, 0) is not None

    assert collapsed(1.0, chance, chance)
    assert collapsed(0.2, 1.0, 0.0, chance)
    assert not collapsed(1.0, chance)
    assert not collapsed(1.0, chance, 0.99, chance)
    assert not collapsed(chance, chance, chance)
    assert not collapsed(1.0, 1.0, 0.9)


def test_a_size_that_grows_a_thousandfold_is_a_finding_and_its_usual_growth_is_not() -> None:
    statistics = RunStatistics(Sentinel())
    for size in (1e-3, 1.0, 2.0, 30.0, 20.0):
        assert statistics.level("slope", size, 0) is None
    finding = statistics.level("slope", 1e4, 7)
    assert finding is not None
    assert finding.since == 7
    assert statistics.level("slope", math.nan, 8) is not None


def test_only_tensors_with_a_nan_or_an_infinity_are_unfit() -> None:
    healthy = {"a": torch.full((4,), 3e38), "n": torch.tensor(3), "e": torch.empty(0)}
    assert unfit(healthy) is None
    for value in (math.nan, math.inf, -math.inf):
        assert unfit({**healthy, "b": torch.tensor([0.0, value])}) == "b"


def test_the_sick_slots_of_a_buffer_and_no_others_begin_afresh() -> None:
    task = toy_task()
    backbone = backbone_of("jem", task)
    buffer = backbone.density.buffer
    limit = edge_limit(task.images("train"), 0.5)
    assert not unhealthy_slots(buffer, task.bounds, limit).any()
    buffer.states[3] = 1.0
    buffer.states[5] = -2.0  # a chain without a box may leave the range
    buffer.states[7, 0, 0, 0] = math.nan
    before = buffer.states.clone()
    unhealthy = unhealthy_slots(buffer, task.bounds, limit)
    assert unhealthy.nonzero().squeeze(1).tolist() == [3, 5, 7]
    assert renew(buffer, unhealthy, torch.Generator().manual_seed(0)) == 3
    assert not unhealthy_slots(buffer, task.bounds, limit).any()
    assert torch.equal(buffer.states[~unhealthy], before[~unhealthy])


@pytest.mark.parametrize("table", [
    "sentinel.tries=-1", "sentinel.policy=[]", 'sentinel.policy=["prayer"]', "sentinel.nats=-1",
])  # fmt: skip
def test_a_senseless_sentinel_is_refused(table: str) -> None:
    with pytest.raises(ConfigError, match=r"sentinel\."):
        toy_recipe(toy_registry(), "jem", "jem", "plain", table)
