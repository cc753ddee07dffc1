"""Every robust figure comes with its failure indicators."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from masked import Detached, linear
from torch import Tensor, nn
from toys import REGISTRY, gen

from jemkit import Images, Preempted
from jemkit.attacks.base import ModelAttack, Threat
from jemkit.attacks.pgd import PGD
from jemkit.attacks.pixel_model import pixel_model
from jemkit.metrics.evaluator import Context, measure
from jemkit_plugins.indicators.plan import ASCENTS, ORDER, planned

ROBUSTNESS = REGISTRY["evaluator"]["robustness"]
DIGITS = REGISTRY["dataset"]["digits"]()
TEST = DIGITS.load("test")
FGSM, PGD20 = REGISTRY["attack"]["fgsm"](), PGD(steps=20)
DATA = Images(TEST.x[:60], TEST.y[:60])


def context(**more: object) -> Context:
    attacks = {"pgd": PGD(steps=20), "more": PGD(steps=5, restarts=2)}
    return Context(gen(), Threat("Linf", 25.5), attacks=attacks, quick=True, **more)  # type: ignore[arg-type]


def test_every_figure_has_its_indicators_by_its_label_with_a_sentence_each() -> None:
    ctx = context()
    model = pixel_model(linear(DIGITS.load("train"), 0))
    figures = measure(model, DATA, [ROBUSTNESS(indicators="full")], ctx)
    table = ctx.notes.tables["indicators"]
    assert [figure.name for figure in figures] == ["pgd20", "pgd5x2"] == list(table)
    for rows in table.values():
        assert len({row["name"] for row in rows}) == len(rows) == 9
        assert all({"name", "flag", "found", "means", "do"} == row.keys() for row in rows)
        assert not [row for row in rows if row["flag"]]


def test_a_model_cut_off_from_its_pixels_is_judged_and_flagged_and_not_an_error() -> None:
    ctx = context()
    model = pixel_model(Detached(linear(DIGITS.load("train"), 0)))
    pgd, _ = measure(model, DATA, [ROBUSTNESS()], ctx)
    assert pgd.value > 0.5
    collected = {row["name"] for row in ctx.notes.tables["indicators"]["pgd20"] if row["flag"]}
    assert "gradient" in collected


def test_figures_are_the_same_without_indicators() -> None:
    model, result = pixel_model(linear(DIGITS.load("train"), 0)), []
    for judge in (ROBUSTNESS(), ROBUSTNESS(indicators=False)):
        ctx = context()
        result.append((measure(model, DATA, [judge], ctx), ctx.notes))
    (with_them, noted), (without, other) = result
    assert [f.value for f in with_them] == [f.value for f in without]
    assert all(torch.equal(noted.rows[name], other.rows[name]) for name in noted.rows)
    assert "indicators" in noted.tables
    assert not other.tables


@given(images=st.integers(1, 200), quick=st.booleans(), batch=st.integers(1, 250),
       ascents=st.booleans(), budget=st.integers(0, 200_000))  # fmt: skip
def test_indicators_never_cost_more_than_their_budget(
    images: int, quick: bool, batch: int, ascents: bool, budget: int
) -> None:
    plan = planned(images, quick=quick, ascents=ascents, batch_size=batch, budget=budget)
    assert plan.passes <= budget
    assert plan.images <= images
    assert {*plan.names, *plan.left_out} == {
        name for name in ORDER if ascents or name not in ASCENTS
    }
    whole = planned(images, quick=quick, ascents=ascents, batch_size=batch)
    assert not whole.left_out
    if budget >= whole.passes:
        assert plan == whole


class Counts(nn.Module):
    """A linear model that counts what passes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.spent = linear(DIGITS.load("train"), 0), 0

    def forward(self, x: Tensor) -> Tensor:
        self.spent += len(x) * (2 if torch.is_grad_enabled() and x.requires_grad else 1)
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize("attacks", [{"fgsm": FGSM}, {"pgd": PGD20}, {"pgd": PGD20, "fgsm": FGSM}])
@pytest.mark.parametrize("quick", [False, True])
def test_what_guards_a_figure_costs_at_most_what_the_figure_does(
    attacks: dict[str, ModelAttack], quick: bool
) -> None:
    spent = []
    for indicators in (False, True):
        model = Counts()
        ctx = replace(context(), attacks=attacks, quick=quick)
        ctx.notes.rows["clean"] = pixel_model(model)(DATA.unit()).argmax(1) == DATA.y
        model.spent = 0
        measure(pixel_model(model), DATA, [ROBUSTNESS(indicators=indicators)], ctx)
        spent.append(model.spent)
    attack, both = spent
    assert both - attack <= attack * (0.5 if quick else 1)
    plan = ctx.notes.tables["indicators_plan"]
    assert plan["left_out"]
    assert plan["passes"] >= both - attack  # random search leaves out what has fallen


def test_the_budget_of_a_run_that_went_on_is_that_of_one_that_was_not_stopped(
    tmp_path: Path,
) -> None:
    model, result = pixel_model(linear(DIGITS.load("train"), 0)), []
    for batches in (1, None):  # the first time it stops in the middle
        calls = iter(range(10**9))

        def stop(most: int | None = batches, calls: Iterator[int] = calls) -> bool:
            return most is not None and next(calls) > 30

        ctx = replace(context(work=tmp_path), batch_size=20, stop=stop)
        with suppress(Preempted):
            measure(model, DATA, [ROBUSTNESS()], ctx)
            result.append(ctx.notes.tables)
    alone = replace(context(), batch_size=20)
    measure(model, DATA, [ROBUSTNESS()], alone)
    assert result == [alone.notes.tables]
