"""The floor of a step, worked by hand; and the released schedule, term by term against jemkit."""

import argparse
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import in_a_new_process
from torch import nn
from toys import gen, root, toy_recipe, toy_registry

from jemkit import EnergyModel, ModelEnergy, SignDescent, run
from jemkit.models.networks import WRN, SmallCNN
from jemkit.runtime.modes import eval_mode, frozen
from jemkit.runtime.precision import numerics
from jemkit.runtime.pytree import same
from jemkit.runtime.timing import fastest
from jemkit.sampling.init_dists import Uniform
from jemkit.sampling.kernels import SGLD, Boxed, eager_gradient
from jemkit.testing import toy_backbone, toy_batch, toy_model, toy_task
from jemkit.training.build import build_run
from jemkit.training.profiling import roofline as profiling
from jemkit.training.profiling.roofline import (  # fmt: skip
    Like,
    Operation,
    StepWork,
    counted,
    flops,
    measured,
    roofline_of,
    rows,
    seconds,
    step_work,
    traffic,
)
from jemkit.updaters import SAM, Plain

sys.path.insert(0, str(root() / "benchmarks"))

from naive import Released, Weights

TASK = toy_task()
CPU = torch.device("cpu")
small = settings(max_examples=15, deadline=None)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products and copies that measure the machine are small."""
    monkeypatch.setitem(profiling.SQUARE, "cpu", 64)
    monkeypatch.setattr(profiling, "LARGE", 2**16)


@small
@given(b=st.integers(1, 5), n=st.integers(1, 7), m=st.integers(1, 7))
def test_a_linear_layer_costs_two_flops_a_weight_and_row(b: int, n: int, m: int) -> None:
    with counted() as work:
        nn.Linear(n, m)(torch.ones(b, n))
    assert flops(work) == 2 * b * n * m
    assert traffic(work) == 4 * (b * n + n * m + m + b * m)


@small
@given(c=st.integers(1, 3), k=st.integers(1, 3), size=st.integers(4, 6), stride=st.integers(1, 2))
def test_a_convolution_costs_two_flops_a_tap_and_output(
    c: int, k: int, size: int, stride: int
) -> None:
    layer = nn.Conv2d(c, k, 3, padding=1, stride=stride)
    with counted() as work:
        out = layer(torch.ones(2, c, size, size))
    assert flops(work) == 2 * 9 * c * out.numel()
    assert traffic(work) == 4 * (2 * c * size**2 + 9 * c * k + k + out.numel())


def test_a_step_by_hand() -> None:
    """M chains of P images, M_adv of B, and an update of all four streams, twice under SAM."""
    registry = toy_registry()
    b, p, steps, adv_steps = 6, 3, 4, 2
    backbone = toy_backbone(TASK, toy_model(TASK, SmallCNN(channels=2)), steps=steps)
    objective = registry["objective"]["ebjdat"](adv_steps=adv_steps)
    work = step_work(backbone, objective, SAM(), toy_batch(TASK, b, p))
    x = toy_batch(TASK, 1).x
    with counted() as gradient, frozen(backbone.model):
        eager_gradient(ModelEnergy(backbone.model), x)
    with counted() as update:
        torch.autograd.grad(backbone.model(x).energy.sum(), [*backbone.model.parameters()])
    assert work.evaluations == 2
    assert flops(work.draw) == (steps * p + adv_steps * b) * flops(gradient)
    assert flops(work.update) == 2 * 2 * (b + p) * flops(update)
    assert flops(work.whole) == flops(work.draw) + flops(work.update)


def test_counting_a_step_leaves_model_and_buffer_alone() -> None:
    backbone = toy_backbone(TASK)
    backbone.model.train()
    model = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    states = backbone.density.buffer.states.clone()
    step_work(backbone, toy_registry()["objective"]["ebjdat"](), Plain(), toy_batch(TASK))
    assert same(model, backbone.model.state_dict())
    assert torch.equal(states, backbone.density.buffer.states)
    assert all(p.grad is None for p in backbone.model.parameters())


def test_a_step_tells_how_often_an_updater_evaluates_the_loss() -> None:
    registry = toy_registry()
    backbone, objective = toy_backbone(TASK), registry["objective"]["ce"]()
    counts = {
        name: step_work(
            backbone, objective, registry["updater"][name](), toy_batch(TASK)
        ).evaluations
        for name in ("plain", "sam", "awp")
    }
    assert counts == {"plain": 1, "sam": 2, "awp": 2}


def test_work_adds_up() -> None:
    a, b = (Operation(name, (), cost, 1) for name, cost in (("a", 3), ("b", 5)))
    whole = StepWork(Counter({a: 1}), Counter({a: 1, b: 1}), 1).whole
    assert whole == {a: 2, b: 1}
    assert flops(whole) == 11


def test_every_operation_of_a_step_can_be_called_by_itself() -> None:
    backbone = toy_backbone(TASK, toy_model(TASK, WRN(depth=10, width=1, norm="batch")))
    work = step_work(
        backbone, toy_registry()["objective"]["ebjdat"](), Plain(), toy_batch(TASK)
    ).whole
    durations = seconds(work, CPU, patience=0)
    assert durations.keys() == work.keys()
    assert min(durations.values()) > 0


def test_noise_like_a_tensor_is_laid_out_like_it() -> None:
    like = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    made = Like.of(like).tensor(gen())
    assert made.stride() == like.stride()
    assert made.shape == like.shape


def test_the_fastest_of_some_calls_counts() -> None:
    calls = []
    assert fastest(lambda: calls.append(1), CPU, patience=0) > 0
    assert len(calls) == 4  # one to warm up, three to measure


def test_the_floor_is_the_higher_of_the_two_and_below_the_step() -> None:
    recipe = toy_recipe(toy_registry()).recipe
    roofline = roofline_of(build_run(recipe), recipe, rounds=1, patience=0)
    figures = roofline.figures()
    assert figures["floor_arithmetic_s"] > 0
    assert figures["floor_memory_s"] > 0
    assert roofline.bound == max(roofline.arithmetic, roofline.memory)
    assert figures["reached"] == pytest.approx(roofline.bound / figures["step_s"])
    assert figures["flops_step"] == figures["flops_draw"] + figures["flops_update"]
    assert all(len(row) == 2 for row in rows(roofline))


def test_no_round_gives_the_floors_alone() -> None:
    recipe = toy_recipe(toy_registry(), "classifier", "ce").recipe
    roofline = roofline_of(build_run(recipe), recipe, rounds=0, patience=0)
    assert roofline.taken is None
    assert roofline.reached is None
    assert "the step took" not in dict(rows(roofline))


def test_a_machine_multiplies_and_copies() -> None:
    rates = measured(CPU, patience=0)
    assert rates.matmul > 0
    assert rates.bandwidth > 0


def released(model: EnergyModel, **options: object) -> Released:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    start = Uniform().build(TASK, CPU)
    return Released(model, optimizer, start, gen(), capacity=12, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_released_loss_is_ours_of_the_same_images(norm: str) -> None:
    """Its fourth term is the clean cross-entropy; its h2 is contrastive and pairs with x_pos."""
    model = toy_model(TASK, SmallCNN(channels=2, norm=norm))
    model.train()
    batch = toy_batch(TASK, 6, 3)
    x_neg, x_adv = torch.rand(batch.x_pos.shape, generator=gen()), batch.x.flip(0)
    naive = released(model, weights=Weights(0.7, 0.5, 0.2, 0.3))
    theirs = naive.loss(batch.x, batch.y, batch.x_pos, x_neg, x_adv)
    options = {"w1": 0.7, "w2": 0.2, "w3": 0.3, "w_clean": 0.5}
    objective = toy_registry()["objective"]["ebjdatreleased"](**options)
    backbone = toy_backbone(TASK, model)
    draws = objective.draw(backbone, batch, gen())._replace(x_neg=x_neg, x_adv=x_adv)
    torch.testing.assert_close(theirs, objective.loss(backbone, batch, draws).total)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_released_chain_to_x_adv_is_ours_from_the_same_start(n: int) -> None:
    model = toy_model(TASK)
    x, y = toy_batch(TASK, n).x, toy_batch(TASK, n).y
    naive = released(model, adv_steps=3)
    start = naive.perturbed(x)
    with eval_mode(model):
        clean = F.normalize(model(x).logits.detach(), dim=1)

    def energy(z: torch.Tensor) -> torch.Tensor:
        scores = model(z)
        far = (clean - F.normalize(scores.logits, dim=1)).square().sum(1)
        return scores.joint(y) - far

    kernel = Boxed(SignDescent(step_size=TASK.bounds.px(1)), TASK.bounds)
    with eval_mode(model):
        ours = run(kernel, energy, start, gen(), 3)
    theirs = naive.adversary(x, y, start)
    assert (ours - theirs).abs().max() <= 2 * TASK.bounds.px(1)  # a sign may flip at a slope of 0
    assert (ours == theirs).float().mean() > 0.99


def test_the_released_chain_of_negatives_is_clamped_sgld() -> None:
    model = toy_model(TASK, SmallCNN(channels=2))
    naive = released(model, steps=3, restart=0.0)
    states = naive.buffer.clone()
    x = naive.negatives(4)
    slots = torch.randint(12, (4,), generator=gen())  # the same generator, from the same seed
    kernel = Boxed(SGLD(step_size=1.0, noise=0.0, clip=1.0), TASK.bounds)
    torch.testing.assert_close(x, run(kernel, ModelEnergy(model), states[slots], gen(), 3))
    torch.testing.assert_close(naive.buffer[slots[-1]], x[-1])


def test_a_released_step_makes_the_passes_that_its_codes_make() -> None:
    """M for x^-, 3 M_adv for each pair of images, six in each of SAM's two losses."""
    model = toy_model(TASK)
    model.train()
    sizes: list[int] = []
    model.network.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    batch = toy_batch(TASK, 5, 3)
    naive = released(model, steps=4, adv_steps=2)
    before = [p.detach().clone() for p in model.parameters()]
    naive.step(batch.x, batch.y, batch.x_pos)
    assert len(sizes) == 4 + 3 * 2 * 3 + 2 * 6
    assert sum(sizes) == 4 * 3 + 3 * 2 * 5 + 2 * (3 * 3 + 3 * 5)
    assert not all(map(torch.equal, before, model.parameters()))


@pytest.mark.slow
def test_a_step_is_much_cheaper_than_the_released_one() -> None:
    """Processor time in turn, of toys; the passes alone are fewer than half."""
    script = str(root() / "benchmarks" / "steps.py")
    done = subprocess.run(
        [sys.executable, script, "--small", "--threads", "1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["steps"].keys() == {"released", "bare", "jemkit+cl+hold"}
    assert record["ratios"]["released / jemkit+cl+hold"]["cpu"] > 1.5
    assert record["ratios"]["bare / jemkit+cl+hold"]["cpu"] > 0.5
    assert record["floor"]["channels_last"]["floor_arithmetic_s"] > 0
    ours = record["steps"]["jemkit+cl+hold"]
    assert ours["images_per_s"] == pytest.approx(16 / ours["wall_s"])
    assert ours["forecast_hours"] == pytest.approx(100 * (45_000 // 16) * ours["wall_s"] / 3600)


@pytest.mark.parametrize("contestant", ["jemkit+cl", "bare"])
def test_contestants_step_by_the_switches_of_a_run(
    contestant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's convolutions are tf32 by torch's own."""
    import steps

    precisions = []

    def made(*_: object) -> Callable[[], None]:
        return lambda: precisions.append(torch.backends.cudnn.conv.fp32_precision)

    monkeypatch.setattr(steps, contestant.split("+")[0], made)
    monkeypatch.setattr(sys, "stdin", io.StringIO("step\n"))
    with numerics(precision="tf32"):
        steps.serve(argparse.Namespace(**steps.SETTINGS, contestant=contestant))
    assert precisions == ["ieee"]


def test_a_gradients_contestants_are_timed_in_turn_by_one_network() -> None:
    from gradients import attacked, chained, contestants, in_turn
    from steps import SETTINGS

    toys = {"depth": 10, "width": 1, "size": 8, "batch": 4, "capacity": 8}
    given = argparse.Namespace(**{**SETTINGS, **toys})
    for mode in (chained, attacked):
        named = contestants(given, mode, 2, "eager")
        timings = in_turn(named, torch.device("cpu"), rounds=2)
        assert timings["bare"]["bare / this"] == 1
        assert all(timings[name]["seconds"] > 0 for name in named)
        assert timings["pays_after_gradients"] > 0


def same_with_reused_memory() -> None:
    from allocator import hold_memory

    model, x = toy_model(TASK), toy_batch(TASK).x
    before = model(x).energy
    assert hold_memory() or not sys.platform.startswith("linux")
    assert torch.equal(before, model(x).energy)


def test_an_allocator_that_keeps_memory_changes_no_number() -> None:
    in_a_new_process(same_with_reused_memory)


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_command_prints_the_floors(form: list[str]) -> None:
    from typer.testing import CliRunner

    from jemkit_cli.bench import app

    parts = ["--backbone", "classifier", "--objective", "ce", "--batch-size", "8"]
    done = CliRunner().invoke(
        app, ["roofline", *parts, "--rounds", "1", "--patience", "0", "--no-plugins", *form]
    )
    assert done.exit_code == 0, done.output
    if form:
        record = json.loads(done.stdout.splitlines()[-1])
        assert record["flops_step"] == record["flops_update"] > 0
        assert record["protocol"]["step"] == "classifier x ce, updater plain"
        assert record["protocol"]["images"] == "8 of digits, [1, 8, 8]"
        assert record["protocol"]["versions"]["torch"] == torch.__version__
        assert (
            0
            < record["reached"]
            == pytest.approx(
                max(record["floor_arithmetic_s"], record["floor_memory_s"]) / record["step_s"]
            )
        )
    else:
        assert "compute bound" in done.stdout
        assert "of its roofline" in done.stdout
        assert "images: 8 of digits" in done.stdout
