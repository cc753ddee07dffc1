"""Energies of clean, attacked and generated images: their gaps, overlap and distance."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import Generator, Tensor, nn
from toys import REGISTRY, gen

from jemkit import Context, Figure, Options, PixelModel, Preempted, Threat, testing
from jemkit.evaluation.evaluate import evaluate
from jemkit.metrics.attack_runner import attacked
from jemkit.metrics.energy_gap import PGD20, energies, energy_gaps, gaps
from jemkit.metrics.evaluator import measure
from jemkit.metrics.figures import bin_edges, histograms, shares
from jemkit.models.energy import EnergyFn
from jemkit.runtime.modes import eval_mode, frozen
from jemkit.testing import toy_backbone, toy_model, toy_task
from jemkit_plugins.energies import Energies, energy_path, overlap, wasserstein

TASK = toy_task(n_train=20)
DATA = TASK.images("valid")
GAPS = ["gap_mean", "gap_variance", "gap_signed", "gap_joint", "gap_relative"]
counts = st.integers(2, 50)


def generative(**options: Any) -> PixelModel:
    backbone = toy_backbone(TASK, **options)
    return PixelModel(backbone.model, TASK.bounds, backbone.density)


def context(**settings: Any) -> Context:
    threat = settings.pop("threat", Threat("Linf", 25.5))
    return Context(gen(), threat, batch_size=8, card={"split": "test"}, **settings)


def figures(subject: PixelModel, ctx: Context, **options: Any) -> dict[str, Figure]:
    judge = Energies(**{"n": 20, "steps": 3, **options})
    return {figure.name: figure for figure in measure(subject, DATA, [judge], ctx)}


def numbers(seed: int, n: int, scale: float = 1.0) -> Tensor:
    return normal(seed, n, scale=scale, dtype=torch.float64)


@given(seed=seeds, n=counts, m=counts, bins=st.integers(2, 60))
def test_an_overlap_is_whole_with_itself_nothing_with_what_lies_apart_and_symmetric(
    seed: int, n: int, m: int, bins: int
) -> None:
    a, b = numbers(seed, n), numbers(seed + 1, m, 3.0)
    assert overlap(a, a, bins) == pytest.approx(1)
    assert overlap(a, b, bins) == pytest.approx(overlap(b, a, bins))
    assert 0 <= overlap(a, b, bins) <= 1 + 1e-9
    apart = b - b.min() + a.max() + 20 + (b.max() - b.min()) + (a.max() - a.min())
    assert overlap(a, apart, max(bins, 3)) == 0


def test_the_overlap_of_two_small_sets_is_as_counted_by_hand() -> None:
    a, b = torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([2.0, 3.0, 4.0, 4.0])
    assert overlap(a, b, 4) == 0.25  # both have one of four in (1, 2]
    assert overlap(torch.zeros(3), torch.zeros(5), 10) == 1


@given(seed=seeds, n=counts, m=counts)
def test_the_distance_of_energies_is_scipys_wasserstein_distance(seed: int, n: int, m: int) -> None:
    from scipy.stats import wasserstein_distance

    a, b = numbers(seed, n), numbers(seed + 1, m, 2.0).round()
    assert wasserstein(a, b) == pytest.approx(wasserstein_distance(a, b), abs=1e-12)


@given(seed=seeds, n=counts, c=st.floats(-50, 50))
def test_a_shift_is_as_far_as_it_is_wide(seed: int, n: int, c: float) -> None:
    a = numbers(seed, n)
    assert wasserstein(a, a + c) == pytest.approx(abs(c), abs=1e-9)
    assert wasserstein(a + c, a) == pytest.approx(abs(c), abs=1e-9)


@given(seed=seeds, n=counts, bins=st.integers(1, 60))
def test_every_value_is_in_one_bin_of_a_histogram(seed: int, n: int, bins: int) -> None:
    a, b = numbers(seed, n), numbers(seed + 1, 5)
    edges = bin_edges([a, b], bins)
    assert float(shares(a, edges).sum()) == pytest.approx(1)
    table = histograms({"a": a, "b": b}, bins)
    assert len(table["edges"]) == bins + 1
    assert len(table["a"]) == bins
    assert table["n"] == {"a": n, "b": 5}
    assert table["mean"]["a"] == pytest.approx(float(a.mean()))


def test_what_is_not_finite_has_no_histogram_and_no_distance() -> None:
    a, broken = torch.zeros(3), torch.tensor([0.0, float("nan")])
    assert overlap(a, broken, 5) != overlap(a, broken, 5)
    assert wasserstein(a, broken) != wasserstein(a, broken)
    table = histograms({"a": a, "broken": broken})
    assert "broken" not in table
    assert table["n"]["broken"] == 2


@given(seed=seeds, n=counts, c=st.floats(-20, 20))
def test_the_gaps_of_a_shift_are_the_shift(seed: int, n: int, c: float) -> None:
    clean, joint = numbers(seed, n), numbers(seed + 1, n)
    result = energy_gaps(clean, clean + c, joint, joint - c)
    assert result["gap_mean"] == pytest.approx(abs(c), abs=1e-9)
    assert result["gap_variance"] == pytest.approx(0, abs=1e-9)
    assert result["gap_signed"] == pytest.approx(c, abs=1e-9)
    assert result["gap_joint"] == pytest.approx(-c, abs=1e-9)
    assert result["gap_relative"] == pytest.approx(
        abs(c) / float(clean.std(correction=0)), abs=1e-6
    )


def test_the_gaps_are_those_of_the_attack_by_pgd_20() -> None:
    subject, ctx = generative(), context()
    measured = figures(subject, ctx)
    with frozen(subject), eval_mode(subject):
        attack = attacked(subject, PGD20, DATA, ctx, "pgd")
        expected = {f.name: f.value for f in gaps(subject, attack, DATA, ctx)}
    assert {name: measured[name].value for name in GAPS} == expected
    difference = ctx.notes.rows["energy_adv"] - ctx.notes.rows["energy"]
    assert measured["gap_signed"].value == pytest.approx(float(difference.mean()), abs=1e-6)
    assert measured["gap_mean"].protocol["steps"] == 20


def test_three_sets_have_tables_and_figures_of_each_pair() -> None:
    ctx = context()
    measured = figures(generative(), ctx)
    pairs = [f"{f}/{p}" for p in ("clean-adv", "clean-gen", "adv-gen")
             for f in ("overlap", "wasserstein")]  # fmt: skip
    assert list(measured) == [*GAPS, *pairs]
    for table in (ctx.notes.tables["energies"], ctx.notes.tables["energies"]["joint"]):
        assert table["n"] == {"clean": 20, "adversarial": 20, "generated": 20}
        for name in table["n"]:
            assert sum(table[name]) == pytest.approx(1)
    assert {"energy_path", "energy_confidence"} <= set(ctx.notes.tables)
    chains = measured["overlap/clean-gen"].protocol["sets"]["generated"]
    assert chains["chain_steps"] == 3
    assert chains["start"] == "uniform"


def test_a_generated_image_is_labelled_as_the_model_reads_it() -> None:
    """So its E(x, y) is the smallest of any class, and no more than log K above E(x)."""
    ctx = context()
    figures(generative(), ctx)
    table = ctx.notes.tables["energies"]
    gap = table["joint"]["mean"]["generated"] - table["mean"]["generated"]
    assert 0 <= gap <= torch.tensor(3.0).log() + 1e-6


def test_the_path_begins_at_the_random_start_and_climbs() -> None:
    subject, ctx = generative(), context()
    with frozen(subject), eval_mode(subject):
        path = energy_path(subject, DATA, ctx)
        still = energy_path(subject, DATA, context(threat=Threat("Linf", 0)))
        clean, joint = energies(subject, DATA, ctx)
    assert path["steps"] == list(range(21))
    assert all(len(path[name]) == 21 for name in ("mean", "joint", "low", "high"))
    assert all(low <= high for low, high in zip(path["low"], path["high"], strict=True))
    assert path["joint"][-1] - path["mean"][-1] > path["joint"][0] - path["mean"][0]
    assert still["mean"] == pytest.approx([float(clean.mean())] * 21, abs=1e-5)
    assert still["joint"] == pytest.approx([float(joint.mean())] * 21, abs=1e-5)


def test_points_of_energy_and_confidence_are_those_of_the_images() -> None:
    ctx, subject = context(), generative()
    figures(subject, ctx)
    points = torch.tensor(ctx.notes.tables["energy_confidence"])
    assert points.shape == (20, 3)
    torch.testing.assert_close(points[:, 0], ctx.notes.rows["energy"])
    assert ((points[:, 1] >= 1 / 3) & (points[:, 1] <= 1)).all()
    with torch.no_grad(), eval_mode(subject):
        right = subject(DATA.unit()).argmax(1) == DATA.y
    assert torch.equal(points[:, 2].bool(), right)


@pytest.mark.parametrize("stop_at", ["0-00001", "00000", "00001"])
def test_a_stopped_measurement_goes_on_from_its_pieces(tmp_path: Path, stop_at: str) -> None:
    whole = figures(generative(), context())
    work = tmp_path / "work"

    def stop() -> bool:
        return bool(list(work.glob(f"*/{stop_at}*.safetensors")))

    with pytest.raises(Preempted):
        figures(generative(), context(work=work, stop=stop))
    before = {path: path.stat().st_mtime_ns for path in work.glob("*/*.safetensors")}
    assert before
    assert figures(generative(), context(work=work)) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_chains_or_other_weights_have_pieces_of_their_own(tmp_path: Path) -> None:
    def folders() -> int:
        return len(list(tmp_path.iterdir()))

    for n, (subject, options) in enumerate([
        (generative(), {}),
        (generative(), {}),
        (generative(), {"steps": 4}),
        (generative(sampler=REGISTRY["sampler"]["sgld"](step_size=0.5)), {}),
    ]):  # fmt: skip
        figures(subject, context(work=tmp_path), **options)
        assert folders() == [2, 2, 3, 4][n]  # one of them the attack's, which all share


class Shade(nn.Module):
    """A classifier of [0, 1] images that nobody here has made."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1, keepdim=True)
        return torch.cat([mean, 1 - mean, x[:, 0, :1, 0]], dim=1)


def test_a_model_without_a_density_leaves_generated_images_out_and_no_more() -> None:
    record = evaluate(Shade(), DATA, registry=REGISTRY, only=("energies",), eps_px=8)
    names = {figure.name for figure in record.figures} - {"clean"}
    assert names == {*GAPS, "overlap/clean-adv", "wasserstein/clean-adv"}
    assert record.tables["energies"]["n"] == {"clean": 20, "adversarial": 20}
    assert not record.left_out


def test_in_the_l1_norm_only_what_is_attacked_is_left_out() -> None:
    ctx = context(threat=Threat("L1", 300.0))
    measured = figures(generative(), ctx)
    assert set(measured) == {"overlap/clean-gen", "wasserstein/clean-gen"}
    assert "L1" in ctx.notes.warnings[0]


class Breaks(Options):
    """A kernel that loses every other chain."""

    needs_stem: ClassVar[bool] = False

    def step(self, energy: EnergyFn, x: Tensor, rng: Generator) -> Tensor:
        lost = torch.arange(len(x)).view(-1, 1, 1, 1) % 2 == 1
        return torch.where(lost, torch.nan, x)


def test_chains_that_end_in_nan_are_counted_and_leave_figures_that_say_so() -> None:
    ctx = context()
    measured = figures(generative(sampler=Breaks()), ctx)
    assert "10 of 20 chains ended in NaN" in ctx.notes.warnings[0]
    for name in ("overlap/clean-gen", "wasserstein/clean-gen", "overlap/adv-gen"):
        assert measured[name].value != measured[name].value
    assert measured["overlap/clean-adv"].value == measured["overlap/clean-adv"].value
    assert "generated" not in ctx.notes.tables["energies"]


def test_energies_keep_the_laws_of_an_evaluator() -> None:
    testing.check_evaluator(Energies(n=20, steps=3))


def test_a_quick_look_draws_few_chains() -> None:
    measured = figures(generative(), context(quick=True), n=None, steps=1)
    assert measured["overlap/clean-gen"].protocol["sets"]["generated"]["chains"] == 64


def test_a_model_of_toys_is_judged_in_eval_mode() -> None:
    model = toy_model(TASK).train()
    subject = PixelModel(model, TASK.bounds)
    one, two = (figures(subject, context()) for _ in range(2))
    assert one == two
    assert model.training
