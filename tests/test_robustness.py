"""Every robust figure comes with its failure indicators."""

import torch
from masked import Detached, linear
from toys import REGISTRY, gen

from jemkit import Images
from jemkit.attack import PGD, Threat
from jemkit.evaluator import Context, measure
from jemkit.pixels import pixel_model

ROBUSTNESS = REGISTRY["evaluator"]["robustness"]
DIGITS = REGISTRY["dataset"]["digits"]()
TEST = DIGITS.load("test")
DATA = Images(TEST.x[:60], TEST.y[:60])


def context(**more: object) -> Context:
    attacks = {"pgd": PGD(steps=20), "more": PGD(steps=5, restarts=2)}
    return Context(gen(), Threat("Linf", 25.5), attacks=attacks, quick=True, **more)  # type: ignore[arg-type]


def test_every_figure_has_its_indicators_by_its_label_with_a_sentence_each() -> None:
    ctx = context()
    figures = measure(pixel_model(linear(DIGITS.load("train"), 0)), DATA, [ROBUSTNESS()], ctx)
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
    found = {row["name"] for row in ctx.notes.tables["indicators"]["pgd20"] if row["flag"]}
    assert {"gradient", "unbounded"} <= found


def test_figures_are_the_same_without_indicators() -> None:
    model, found = pixel_model(linear(DIGITS.load("train"), 0)), []
    for judge in (ROBUSTNESS(), ROBUSTNESS(indicators=False)):
        ctx = context()
        found.append((measure(model, DATA, [judge], ctx), ctx.notes))
    (with_them, noted), (without, other) = found
    assert [f.value for f in with_them] == [f.value for f in without]
    assert all(torch.equal(noted.rows[name], other.rows[name]) for name in noted.rows)
    assert "indicators" in noted.tables
    assert not other.tables
