"""What holds on a GPU alone: no waiting inside a step, and a guard that is read a step later."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from toys import backbone_of, objective_of, tiny, toy_recipe, toy_registry

from jemkit import PYLD, SGLD, Backbone, Batch, Diverged, Guard, Terms, Trainer, train_step
from jemkit.models.energy import ModelEnergy
from jemkit.models.networks import WRN, SmallCNN
from jemkit.runtime import fsdp
from jemkit.runtime.microbatch import MicroBatch
from jemkit.runtime.modes import sampling_mode
from jemkit.runtime.precision import numerics
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.sampling.compile import Backend, CompiledGradient
from jemkit.sampling.kernels import L2Descent, SignDescent, eager_gradient
from jemkit.testing import toy_batch, toy_model, toy_task
from jemkit.training.objective_contexts import compiled_chains
from jemkit.updaters import EMA

pytestmark = pytest.mark.cuda
TASK = toy_task()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def batch() -> Batch:
    x, y, x_pos, index, step = toy_batch(TASK)
    return Batch(x.cuda(), y.cuda(), x_pos.cuda(), index.cuda(), step)


def on_gpu(name: str, **options: object) -> Backbone:
    built: Backbone = tiny("backbone", name, **options).build(TASK, generator())
    built.model.train()
    return built


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def fused(backbone: Backbone, updater: str = "plain") -> object:
    optimizer = torch.optim.SGD(backbone.model.parameters(), lr=0.01, momentum=0.9, fused=True)
    return tiny("updater", updater).build(backbone.model, optimizer)


@pytest.mark.parametrize("objective", ["ce", "pgdat", "trades", "jem", "ebjdat"])
@pytest.mark.parametrize("updater", ["plain", "sam", "awp"])
def test_a_step_trains_on_the_device(objective: str, updater: str) -> None:
    backbone = on_gpu("sadajem")
    before = [p.detach().clone() for p in backbone.model.parameters()]
    guard = Guard()
    step = fused(backbone, updater)
    for _ in range(2):
        terms = train_step(
            backbone, objective_of(objective), step, batch(), generator(1), guard
        )  # fmt: skip
    guard.settle()
    assert terms.total.is_cuda
    assert terms.total.isfinite()
    assert not all(map(torch.equal, before, backbone.model.parameters()))


def test_the_buffer_and_every_generator_live_on_the_device() -> None:
    backbone = on_gpu("sadajem")
    assert backbone.density.buffer.states.is_cuda
    with pytest.raises(RuntimeError):
        backbone.density.draw(backbone.model, 40, torch.Generator())  # two of them restart


@pytest.mark.parametrize("sampler", [SGLD(), PYLD(), SignDescent(), L2Descent()])
def test_no_step_of_a_chain_waits_for_the_device(sampler: SGLD) -> None:
    backbone, rng = on_gpu("jem", sampler=sampler), generator(1)
    backbone.density.draw(backbone.model, 6, rng)  # what libraries set up on their first call
    with nobody_waits():
        backbone.density.draw(backbone.model, 6, rng)


@pytest.mark.parametrize("name", ["jem", "jempp", "mebm", "sadajem"])
def test_the_draws_of_ebjdat_wait_for_nothing(name: str) -> None:
    backbone, rng, data = on_gpu(name), generator(1), batch()
    objective = objective_of("ebjdat")
    objective.draw(backbone, data, rng)
    with nobody_waits():
        objective.draw(backbone, data, rng)


class Sick:
    """An objective whose total is not finite from its second call on."""

    needs_density = False

    def __init__(self) -> None:
        self.calls = 0

    def draw(self, *_: object) -> None:
        return None

    def loss(self, backbone: Backbone, data: Batch, draws: None) -> Terms:
        self.calls += 1
        energy = backbone.model(data.x).energy.mean()
        return Terms.weighted({"E": (1.0, energy * (float("nan") if self.calls == 2 else 1.0))})


def test_the_guard_skips_an_update_on_the_device_and_tells_a_step_later() -> None:
    backbone, guard, objective = on_gpu("classifier"), Guard(), Sick()
    updater, data = fused(backbone), batch()
    train_step(backbone, objective, updater, data, generator(), guard)
    before = [p.detach().clone() for p in backbone.model.parameters()]
    train_step(backbone, objective, updater, data, generator(), guard)  # not finite; nobody looks
    assert all(map(torch.equal, before, backbone.model.parameters()))
    with pytest.raises(Diverged, match="update 2: not finite: E = nan"):
        train_step(backbone, objective, updater, data, generator(), guard)


def test_an_average_waits_for_nothing_and_is_bit_for_bit_that_of_tensor_by_tensor() -> None:
    model = on_gpu("sadajem").model
    ema = EMA(model, 0.9)
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for t in model.state_dict().values():
            t.copy_(t * 3 + 1)
    ema.update(model)  # what libraries set up on their first call
    with nobody_waits():
        ema.update(model)
    for name, t in model.state_dict().items():
        for _ in range(2):
            expected[name].lerp_(t, 1 - 0.9) if name in weights else expected[name].copy_(t)
        assert torch.equal(ema.average[name], expected[name]), name


def test_settling_tells_at_once() -> None:
    backbone, guard, objective = on_gpu("classifier"), Guard(), Sick()
    updater = fused(backbone)
    for _ in range(2):
        train_step(backbone, objective, updater, batch(), generator(), guard)
    with pytest.raises(Diverged):
        guard.settle()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_run_trains_in_every_precision_and_goes_on_where_it_was_cut(
    tmp_path: Path, precision: str
) -> None:
    registry = toy_registry()
    options = ["run.device=cuda", f"run.precision={precision}", "run.deterministic=true"]
    recipe = toy_recipe(registry, "sadajem", "ebjdat", "sam", *options)
    ends = []
    for cut in (8, 4):
        trainer = Trainer(recipe, RunFolder.create(tmp_path / f"{cut}"))
        trainer.run(until=cut)
        if cut == 4:
            state = trainer.state_dict()
            trainer = Trainer(recipe, RunFolder(tmp_path / f"{cut}"))
            trainer.load_state_dict(state)
            trainer.run(until=8)
        ends.append(trainer.state_dict())
    for key in ("model", "density", "rng"):
        assert same(ends[0][key], ends[1][key])
    assert all(t.isfinite().all() for t in ends[0]["model"].values())


def test_energies_are_float32_where_passes_run_in_bfloat16() -> None:
    backbone = backbone_of("classifier")
    backbone.model.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        scores = backbone.model(batch().x)
    assert scores.energy.dtype == scores.logits.dtype == torch.float32


@contextmanager
def group_of_one() -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("updater", ["plain", "sam", "awp"])
def test_weights_in_shares_move_on_the_device_as_whole_ones(updater: str) -> None:
    """Of one process, which keeps all; nccl and the chains' passes by the first layer alone."""
    ends = []
    with group_of_one():
        for shared in (False, True):
            backbone, guard = on_gpu("jempp", sampler=PYLD()), Guard()
            if shared:
                fsdp.shard(backbone.model, batch().x[:1])
            optimizer = torch.optim.SGD(backbone.model.parameters(), lr=0.01, momentum=0.9)
            moved = tiny("updater", updater).build(backbone.model, optimizer)
            for _ in range(2):
                train_step(backbone, objective_of("jem"), moved, batch(), generator(1), guard)
            guard.settle()
            ends.append(fsdp.whole(dict(backbone.model.named_parameters())))
    for name, p in ends[0].items():
        torch.testing.assert_close(ends[1][name], p.detach().cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_gradient_is_the_eager_one_as_images_and_weights_move(backend: Backend) -> None:
    """Of inductor a CUDA graph, which reads its inputs in every call and stores none of them."""
    backbone, unit, data = on_gpu("jem"), CompiledGradient(backend), batch()
    pairs: list[tuple[Tensor, Tensor]] = []
    with numerics(), sampling_mode(backbone.model, "batch_stats"):
        for turn in range(5):
            x, energy = data.x.roll(turn, 0), ModelEnergy(backbone.model, data.y)
            pairs.append((unit(energy, x), eager_gradient(energy, x)))
            with torch.no_grad():
                for p in backbone.model.parameters():
                    p.mul_(0.9)
    assert not unit.given_up
    assert len(unit.compilations) == 1
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["ebjdat", "pgdat", "trades", "jem"])
def test_steps_with_compiled_chains_train_as_eager_ones_do(objective: str) -> None:
    ends = []
    for unit in (None, CompiledGradient("eager")):
        backbone, rng = on_gpu("sadajem"), generator(1)
        chosen = objective_of(objective)
        if unit is not None:
            chosen = compiled_chains(chosen, unit)
        step, guard = fused(backbone, "sam"), Guard()
        with numerics(deterministic=True):
            for _ in range(4):
                train_step(backbone, chosen, step, batch(), rng, guard)
        guard.settle()
        ends.append([p.detach().clone() for p in backbone.model.parameters()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_batch_norm_may_keep_its_activations_on_the_host() -> None:
    states = []
    for size in (0, 2):
        backbone = on_gpu("sadajem")
        with numerics(deterministic=True), MicroBatch(size).active():
            train_step(
                backbone, objective_of("ebjdat"), fused(backbone), batch(), generator(1), Guard()
            )
        states.append(backbone.model.state_dict())
    assert all(torch.allclose(states[1][k], t, atol=1e-5) for k, t in states[0].items())


def test_a_pass_in_slices_takes_less_of_the_device() -> None:
    model = toy_model(TASK, SmallCNN(channels=32, norm="none")).cuda()
    x, peaks, grads = torch.rand((512, *TASK.shape), device="cuda"), [], []
    model(x).energy.mean().backward()  # what libraries set up on their first call
    for size in (0, 32):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        with numerics(deterministic=True), MicroBatch(size).active():
            model(x).energy.mean().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        grads.append(next(model.parameters()).grad.clone())
    assert peaks[1] < peaks[0]
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [0, 4])
def test_activations_are_recomputed_in_the_thread_of_the_backward_pass(size: int) -> None:
    x, grads = torch.rand((16, *TASK.shape), device="cuda", generator=generator()), []
    for recompute in (False, True):
        model = toy_model(TASK, WRN(depth=10, width=1, norm="none")).cuda()
        with MicroBatch(size, recompute=recompute).active():
            model(x).energy.mean().backward()
        grads.append(next(model.parameters()).grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def test_a_device_that_is_full_halves_the_micro_batch() -> None:
    filling: list[torch.Tensor] = []
    model, micro = toy_model(TASK, SmallCNN(channels=2, norm="none")).cuda(), MicroBatch()

    def work() -> torch.Tensor:
        with torch.no_grad():
            energy = model(batch().x).energy
        if not filling:
            filling.append(energy)
            torch.empty(2**50, device="cuda")
        return energy

    assert micro.retry_on_oom(work).isfinite().all()
    assert micro.size == len(batch().x) // 2
