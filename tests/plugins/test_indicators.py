"""A model that masks its gradient is flagged every time; an honest one never is."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from masked import (
    RADIUS_PX,
    Detached,
    Noisy,
    Quantised,
    Saturated,
    batch_normed,
    linear,
    trained,
)
from torch import Tensor, nn
from toys import REGISTRY, gen

from jemkit import Images
from jemkit.attacks.autoattack import Stage
from jemkit.attacks.base import Norm, Threat
from jemkit.attacks.pgd import PGD, margin
from jemkit.attacks.pixel_model import PixelModel, pixel_model, with_gradient
from jemkit.metrics.attack_runner import Attacked, attacked
from jemkit.metrics.evaluator import Context
from jemkit.metrics.outputs import Finding, at_least, surely
from jemkit.models.networks import MLP
from jemkit.runtime.modes import eval_mode, frozen
from jemkit.runtime.pytree import same
from jemkit.testing.law import state_of
from jemkit_plugins.indicators import examine
from jemkit_plugins.indicators.findings import aa_under_pgd

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
WHITE_BOX = {"gradient", "unbounded"}


@cache
def digits(split: str) -> Images:
    images: Images = REGISTRY["dataset"]["digits"]().load(split)
    return images


@cache
def robust(seed: int) -> nn.Module:
    return trained(digits("train"), seed, robust=True, epochs=4)


@cache
def undefended(seed: int) -> nn.Module:
    return trained(digits("train"), seed, robust=False, epochs=4)


MASKED: dict[str, tuple[Callable[[int], nn.Module], set[str]]] = {
    "saturated": (lambda s: Saturated(undefended(s)), WHITE_BOX),
    "noisy": (lambda s: Noisy(undefended(s), s), {"random"}),
    "quantised": (lambda s: Quantised(undefended(s)), WHITE_BOX),
    "batch normed": (lambda s: batch_normed(digits("train"), s), {"batch"}),
    "detached": (lambda s: Detached(undefended(s)), WHITE_BOX | {"black box", "transfer"}),
    "saturated robust": (lambda s: Saturated(robust(s)), WHITE_BOX),
    "quantised robust": (lambda s: Quantised(robust(s)), WHITE_BOX),
    "detached robust": (lambda s: Detached(robust(s)), WHITE_BOX),
    "noisy robust": (lambda s: Noisy(robust(s), s), {"random"}),
}
HONEST: dict[str, Callable[[int], nn.Module]] = {
    "robust": robust,
    "robust perceptron": lambda s: trained(
        digits("train"), s, robust=True, spec=MLP(hidden=64, layers=2), epochs=4
    ),
    "undefended": undefended,
    "linear": lambda s: linear(digits("train"), s),
    "hardly trained": lambda s: linear(digits("train"), s, epochs=10),
}


PLAUSIBLE = [
    pytest.param(name, marks=pytest.mark.slow if name == "robust perceptron" else ())
    for name in HONEST
]
DIAGONAL = {("robust", 150), ("undefended", 60), ("linear", 20)}
MARKS = ["saturated", "noisy robust", "batch normed"]
"""A model for each finding that gives one away, white-box, of randomness and of the batch."""
KINDS = [
    pytest.param(name, marks=() if "robust" not in name else pytest.mark.slow) for name in MASKED
]
REPRESENTATIVE = [
    pytest.param(name, marks=() if name in MARKS else pytest.mark.slow) for name in MASKED
]


WHITE_BOX_ALONE = [  # the other findings compare logits, whatever the norm
    pytest.param(name, marks=() if name == "saturated" else pytest.mark.slow) for name in MASKED
]


def context(seed: int, norm: Norm = "Linf", px: float = RADIUS_PX, **more: object) -> Context:
    return Context(gen(seed), Threat(norm, px), seed=seed, **more)  # type: ignore[arg-type]


def verdict(
    module: nn.Module, ctx: Context, n: int = 60, images: int = 32, *, bounded: bool = False
) -> dict[str, Finding]:
    """The findings of PGD-20's figure, by their names."""
    data = Images(digits("test").x[:n], digits("test").y[:n])
    with frozen(module), eval_mode(module):
        subject = with_gradient(pixel_model(module), data.unit()[:2])
        attacked_by = {"pgd": attacked(subject, PGD(steps=20), data, ctx, "pgd")}
        budget = attacked_by["pgd"].passes if bounded else None
        rows = examine(subject, data, attacked_by, ctx, images, budget)["pgd20"]
    return {row["name"]: row for row in rows}


def flags(result: dict[str, Finding]) -> set[str]:
    return {name for name, row in result.items() if row["flag"]}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", KINDS)
def test_a_model_built_to_mask_gradients_is_flagged_by_what_it_does(name: str, seed: int) -> None:
    build, expected = MASKED[name]
    assert expected <= flags(verdict(build(seed), context(seed)))


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_masked_model_is_flagged_in_a_quick_look_too(name: str) -> None:
    build, expected = MASKED[name]
    flagged = flags(verdict(build(0), context(0, quick=True)))
    assert flagged & expected


@pytest.mark.parametrize("name", KINDS)
def test_a_masked_model_is_flagged_within_the_passes_of_one_attack(name: str) -> None:
    build, expected = MASKED[name]
    assert flags(verdict(build(0), context(0), n=150, images=64, bounded=True)) & expected


BUDGETS = [
    pytest.param(name, n, marks=() if (name, n) in DIAGONAL else pytest.mark.slow)
    for name in ("robust", "undefended", "linear")
    for n in (150, 60, 20)
]


@pytest.mark.parametrize(("name", "n"), BUDGETS)
def test_an_honest_model_is_not_flagged_within_the_passes_of_one_attack(name: str, n: int) -> None:
    findings = verdict(HONEST[name](0), context(0), n=n, bounded=True)
    assert not flags(findings), [row["found"] for row in findings.values() if row["flag"]]


@pytest.mark.parametrize("name", WHITE_BOX_ALONE)
def test_a_masked_model_is_flagged_in_l2_too(name: str) -> None:
    build, expected = MASKED[name]
    assert expected & flags(verdict(build(0), context(0, "L2", 200.0)))


@cache
def honest(name: str, seed: int) -> tuple[dict[str, Finding], Context]:
    """The findings of an honest model, and the context that holds its curves."""
    ctx = context(seed)
    return verdict(HONEST[name](seed), ctx), ctx


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PLAUSIBLE)
def test_an_honest_model_is_never_flagged(name: str, seed: int) -> None:
    findings, _ = honest(name, seed)
    assert not flags(findings), [row["found"] for row in findings.values() if row["flag"]]


THREATS = {
    "L2": context(3, "L2", 200.0), "quick": context(3, quick=True), "narrow": context(3, px=2.0),
    "wide": context(3, px=100.0), "none": context(3, px=0.0), "L1": context(3, "L1", 1500.0),
    "small batches": context(3, batch_size=20),
    "quick, small batches": context(3, quick=True, batch_size=20),
}  # fmt: skip
QUICK = {"robust": {"L2", "wide", "L1"}, "undefended": {"none", "quick, small batches"}}
UNDER = [
    pytest.param(name, threat, marks=() if threat in QUICK[name] else pytest.mark.slow)
    for name in QUICK
    for threat in THREATS
]


@pytest.mark.parametrize(("name", "threat"), UNDER)
def test_an_honest_model_is_not_flagged_under_any_threat(name: str, threat: str) -> None:
    data, module = Images(digits("test").x[:60], digits("test").y[:60]), HONEST[name](0)
    ctx = THREATS[threat]
    with frozen(module), eval_mode(module):
        model = pixel_model(module)
        pgd = Attacked("pgd20", data.unit(), random_stand(model, data, ctx), {}, {})
        rows = examine(model, data, {"pgd": pgd}, ctx, 32)["pgd20"]
    assert not [row["found"] for row in rows if row["flag"]]


def random_stand(model: PixelModel, data: Images, ctx: Context) -> Tensor:
    """What an attack leaves: PGD-20 where it knows the norm, else a longer random search."""
    if ctx.threat.norm != "L1":
        return attacked(model, PGD(steps=20), data, ctx, "pgd").right
    square = Stage("square", steps=600).bind(model, ctx.threat)
    x_adv = square(data.unit(), data.y, gen(1))
    return model(x_adv).argmax(1) == data.y


def test_an_attack_that_hardly_moves_is_flagged_though_the_model_is_honest() -> None:
    module = undefended(0)
    data, ctx = Images(digits("test").x[:100], digits("test").y[:100]), context(0)
    with frozen(module), eval_mode(module):
        model = pixel_model(module)
        attacked_by = {"pgd": attacked(model, PGD(steps=1, step_px=0.001), data, ctx, "pgd")}
        rows = {row["name"]: row for row in examine(model, data, attacked_by, ctx, 64)["pgd1"]}
    assert flags(rows) == {"black box", "transfer"}
    assert "weaker" in rows["black box"]["means"]


def test_findings_and_curves_depend_on_the_seed_alone_and_the_model_is_left_alone() -> None:
    module = undefended(0)
    before = state_of(module)
    one, two = context(5, quick=True), context(5, quick=True)
    torch_state = torch.get_rng_state()
    assert verdict(module, one) == verdict(module, two)
    assert one.notes.tables == two.notes.tables
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert same(state_of(module), before)


def test_curves_begin_at_the_clean_accuracy_and_hold_the_figure_of_the_radius() -> None:
    _, ctx = honest("robust", 0)
    for name in ("radius_curve", "steps_curve"):
        curve = ctx.notes.tables[name]
        accuracy = [point[1] for point in curve["points"]]
        assert curve["points"][0][0] == 0
        assert round(accuracy[0] * curve["n"]) == 32
        assert all(low <= value <= high for _, value, low, high in curve["points"])
        assert accuracy == sorted(accuracy, reverse=True)
    radii = [point[0] for point in ctx.notes.tables["radius_curve"]["points"]]
    assert RADIUS_PX in radii


def test_progress_ends_at_its_total_and_never_falls() -> None:
    reports: list[tuple[str, int, int]] = []
    ctx = context(0, quick=True, progress=lambda *messages: reports.append(messages))
    verdict(undefended(0), ctx)
    messages = [(done, total) for what, done, total in reports if what == "indicators"]
    assert messages[-1][0] == messages[-1][1]
    assert [done for done, _ in messages] == sorted(done for done, _ in messages)


def test_where_no_image_is_right_there_is_nothing_to_find() -> None:
    data = Images(digits("test").x[:5], digits("test").y[:5])
    model = pixel_model(linear(digits("train"), 0))
    wrong = Images(data.x, (model(data.unit()).argmax(1) + 1) % 10)
    pgd = Attacked("pgd20", data.unit(), torch.zeros(5, dtype=torch.bool), {}, {})
    assert examine(model, wrong, {"pgd": pgd}, context(0), 128) == {"pgd20": []}


@pytest.mark.parametrize(("pgd", "aa", "flag"), [(60, 58, False), (60, 50, False), (60, 0, True)])
def test_autoattack_far_under_pgd_is_flagged(pgd: int, aa: int, flag: bool) -> None:
    rows = [torch.arange(100) < n for n in (pgd, aa)]
    one, two = (Attacked(k, torch.empty(0), r, {}, {}) for k, r in zip("pa", rows, strict=True))
    assert aa_under_pgd(one, two)["flag"] is flag


@given(n=st.integers(1, 5000), share=st.floats(0, 1), tolerance=st.floats(0, 0.5))
def test_a_share_within_its_tolerance_is_no_flag_and_more_images_never_hide_one(
    n: int, share: float, tolerance: float
) -> None:
    count = round(share * n)
    assert 0 <= at_least(count, n) <= count / n
    if count / n <= tolerance:
        assert not surely(count, n, tolerance)
    assert at_least(10 * count, 10 * n) >= at_least(count, n)


def test_no_image_in_any_number_is_no_flag() -> None:
    assert at_least(0, 100) == at_least(-3, 100) == at_least(0, 0) == 0
    assert at_least(50, 100) == pytest.approx(0.3436, abs=1e-3)  # (p + z^2/2n - half) / (1 + z^2/n)


def test_the_margin_is_the_lead_of_the_labels_logit() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert margin(logits, torch.tensor([0, 2])).tolist() == [1.0, -1.0]
