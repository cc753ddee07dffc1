"""A micro-batch changes what is held at once and nothing else; memory that runs out halves it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import every_rank
from strategies import seeds, uniform
from torch import Tensor, nn
from toys import (
    REGISTRY,
    UPDATERS,
    CrampedPlugin,
    Room,
    backbone_of,
    gen,
    objective_of,
    toy_recipe,
    toy_registry,
    updater_of,
)

import jemkit as api
from jemkit import (
    MALA,
    PGD,
    PYLD,
    SGLD,
    Guard,
    ModelEnergy,
    SGLDMomentum,
    SignDescent,
    Terms,
    Trainer,
    run,
    train_step,
)  # fmt: skip
from jemkit.attacks.base import Threat
from jemkit.attacks.pixel_model import PixelModel, pixel_model
from jemkit.attacks.purification import Refined, Refinement
from jemkit.config.registry import Plugin
from jemkit.errors import OutOfMemory
from jemkit.evaluation.export import export
from jemkit.evaluation.sample import sample
from jemkit.metrics.attack_runner import attacked
from jemkit.metrics.evaluator import Context
from jemkit.models.networks import SmallCNN
from jemkit.models.norms import Norm
from jemkit.runtime import distributed
from jemkit.runtime.checkpoint import load
from jemkit.runtime.microbatch import MicroBatch, out_of_memory, retry_on_oom
from jemkit.runtime.modes import eval_mode, frozen, frozen_batch_stats
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.sampling.compile import CompiledGradient
from jemkit.sampling.density import Contrastive
from jemkit.sampling.kernels import L2Descent, Sampler
from jemkit.testing import toy_batch, toy_model, toy_task
from jemkit.training.objective_contexts import in_bf16

TASK = toy_task()
B = 6
BATCH = toy_batch(TASK, B, positives=4)
GUESTS = toy_registry([Plugin("cramped", CrampedPlugin, "jemkit")])
TINY = 1e-6  # a sum over slices is rounded apart from a sum over rows, and a row alone from many
sizes = st.integers(1, B)


def rowwise(norm: Norm = "group", seed: int = 0) -> Any:
    return toy_model(TASK, SmallCNN(channels=2, norm=norm), seed=seed)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=TINY, atol=TINY)


CHAINED = [
    SGLD(), SGLDMomentum(), MALA(step_size=0.1, temperature=1.0), PYLD(), SignDescent(),
    L2Descent(),
]  # fmt: skip


@given(seeds, sizes, st.sampled_from(CHAINED),
       st.sampled_from(["none", "batch", "group", "instance"]))  # fmt: skip
def test_a_chain_in_slices_is_the_whole_chain(
    seed: int, size: int, sampler: Sampler, norm: Norm
) -> None:
    model, x = rowwise(norm, seed), uniform(seed, B, *TASK.shape)
    y = torch.arange(B) % 3
    rngs = gen(1), gen(1)
    with frozen(model), eval_mode(model):
        if isinstance(sampler, SignDescent):
            model, x = model.double(), x.double()  # no sign turns where a slope is almost 0
        whole = run(sampler, ModelEnergy(model, y), x, rngs[0], 3)
        with MicroBatch(size).active():
            sliced = run(sampler, ModelEnergy(model, y), x, rngs[1], 3)
    assert close(sliced, whole)
    assert torch.equal(rngs[0].get_state(), rngs[1].get_state())


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_on_one_thread_of_a_cpu_a_chain_in_slices_of_several_images_is_the_same_bit_for_bit(
    norm: Norm, size: int
) -> None:
    model, threads = rowwise(norm), torch.get_num_threads()
    torch.set_num_threads(1)
    with frozen(model), eval_mode(model):
        whole = run(SGLD(), ModelEnergy(model), BATCH.x, gen(1), 3)
        with MicroBatch(size).active():
            sliced = run(SGLD(), ModelEnergy(model), BATCH.x, gen(1), 3)
    torch.set_num_threads(threads)
    assert torch.equal(sliced, whole)


@given(sizes, st.sampled_from(["ebjdat", "jem", "pgdat", "trades"]))
def test_the_draws_of_an_objective_are_those_of_the_whole_batch(size: int, name: str) -> None:
    draws = []
    for most in (0, size):
        backbone, rng = backbone_of("jem", network=SmallCNN(channels=2, norm="group")), gen(1)
        backbone.model.double()
        backbone.density.buffer.states = backbone.density.buffer.states.double()
        batch = BATCH._replace(x=BATCH.x.double(), x_pos=BATCH.x_pos.double())
        with MicroBatch(most).active():
            drawn = objective_of(name).draw(backbone, batch, rng)
        tensors = [drawn] if isinstance(drawn, Tensor) else [t for t in drawn if t is not None]
        draws.append([*tensors, backbone.density.buffer.states, rng.get_state().double()])
    assert all(map(close, *draws))


def updated(size: int, objective: str, updater: str, norm: Norm, **options: Any) -> Any:
    """A backbone's state after two steps."""
    network = SmallCNN(channels=2, norm=norm)
    backbone = backbone_of("jem", network=network, density=Contrastive(penalty=0.3))
    chosen = objective_of(objective, **options)
    moved, guard, rng = updater_of(updater, backbone.model), Guard(), gen(1)
    with MicroBatch(size).active():
        for _ in range(2):
            train_step(backbone, chosen, moved, BATCH, rng, guard)
    return backbone.model.state_dict()


@pytest.mark.parametrize("updater", UPDATERS)
@pytest.mark.parametrize("objective", ["ce", "pgdat", "trades", "jem", "ebjdat", "ebjdatreleased"])
@pytest.mark.parametrize("size", [1, 4])
def test_an_update_in_slices_is_the_whole_update(objective: str, updater: str, size: int) -> None:
    whole, sliced = (updated(n, objective, updater, "group") for n in (0, size))
    assert all(close(sliced[name], t) for name, t in whole.items())


def test_terms_that_are_no_mean_over_rows_are_exact_too() -> None:
    whole, sliced = (updated(n, "ebjdat", "sam", "none", outer="squared") for n in (0, 2))
    assert all(close(sliced[name], t) for name, t in whole.items())


def test_slices_run_in_the_precision_of_the_whole() -> None:
    results = []
    for size in (0, 2):
        backbone = backbone_of("jem", network=SmallCNN(channels=2, norm="group"))
        objective, updater = in_bf16(objective_of("jem"), "cpu"), updater_of("sam", backbone.model)
        with MicroBatch(size).active():
            terms = train_step(backbone, objective, updater, BATCH, gen(1), Guard())
        results.append((backbone.model.state_dict(), terms.total))
    assert torch.allclose(results[0][1], results[1][1], atol=TINY)  # in float32 it is 1e-3 off
    grain = 2e-3  # of bfloat16, in gradients that are summed slice by slice
    assert all(torch.allclose(results[1][0][k], t, atol=grain) for k, t in results[0][0].items())


@pytest.mark.parametrize("updater", UPDATERS)
def test_batch_norm_keeps_the_whole_batchs_statistics_and_moves_them_once(updater: str) -> None:
    whole, sliced = (updated(n, "jem", updater, "batch") for n in (0, 2))
    assert same(whole, sliced)


@given(seeds, sizes)
def test_a_slope_that_is_differentiated_again_is_exact(seed: int, size: int) -> None:
    subject = PixelModel(rowwise("none", seed).double(), TASK.bounds)
    model = Refined(subject, Refinement(steps=2, gradient="exact"))
    slopes = []
    for most in (0, size):
        x = uniform(seed, B, *TASK.shape, low=0).double().requires_grad_()
        with MicroBatch(most).active():
            slopes.append(torch.autograd.grad(model(x)[:, 0].sum(), x)[0])
    assert close(*slopes)


def saved_bytes(size: int) -> int:
    """The bytes that a loss's graph holds for its way back."""
    model, total = rowwise("none"), [0]

    def pack(t: Tensor) -> Tensor:
        total[0] += t.numel() * t.element_size()
        return t

    with MicroBatch(size).active(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(BATCH.x).energy.mean()
    return total[0]


def test_a_graph_in_slices_holds_no_activations() -> None:
    assert saved_bytes(2) < saved_bytes(0) / 3  # its input, its features and the head's


@pytest.mark.parametrize("size", range(1, B + 1))
@pytest.mark.parametrize("name", ["jem", "jempp"])
def test_no_pass_has_more_images_than_the_micro_batch(name: str, size: int) -> None:
    backbone = backbone_of(name, network=SmallCNN(channels=2, norm="none"))
    room = backbone.model.network = Room(backbone.model.network, size)
    with MicroBatch(size).active():
        draws = objective_of("ebjdat").draw(backbone, BATCH, gen())
        objective_of("ebjdat").loss(backbone, BATCH, draws).total.backward()
    assert 0 < room.largest <= size


def test_a_compiled_gradient_is_eager_where_it_would_be_cut() -> None:
    model, unit = rowwise(), CompiledGradient("eager")
    with frozen(model), eval_mode(model), MicroBatch(2).active():
        unit(ModelEnergy(model), BATCH.x)
        assert not unit.compilations
        unit(ModelEnergy(model), BATCH.x[:2])
    assert len(unit.compilations) == 1


def test_what_allocators_say_is_known_and_nothing_else_is() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert out_of_memory(caught.value)
    assert out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN, seen at a limit
    assert out_of_memory(RuntimeError("GET was unable to find an engine to execute this"))  # cuDNN
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        retry_on_oom(partial(failing, RuntimeError("shapes do not fit")))


def failing(error: Exception) -> None:
    raise error


@settings(max_examples=20)
@given(st.integers(1, 7), st.integers(1, 20))
def test_work_is_done_again_with_half_the_images_and_the_same_draws(room: int, n: int) -> None:
    network, rng, sizes = Room(SmallCNN(channels=1).build(TASK.shape), room), gen(3), []
    model = toy_model(TASK)
    model.network = network

    def work() -> Tensor:
        x = torch.randn((n, *TASK.shape), generator=rng)
        with torch.no_grad():
            return network_pass(x)

    def network_pass(x: Tensor) -> Tensor:
        return ModelEnergy(model).stem(x)

    micro = MicroBatch()
    features = micro.fit(work, rng, on_change=lambda **what: sizes.append(what["images"]))
    tried = [n // 2**k for k in range(6) if n // 2**k]
    refused = [most for most in tried if -(-n // -(-n // most)) > room]  # in slices of equal size
    halvings = tried[1 : 1 + len(refused)]
    assert sizes == halvings
    assert micro.size == (halvings or [0])[-1]
    assert close(features, network.inner.stem(torch.randn((n, *TASK.shape), generator=gen(3))))


def recipe(*overrides: str, norm: str = "none") -> Any:
    """Two epochs of six steps; an update's pass has 9 + 9 + 9 + 9 images, a chain's 9."""
    network = ("backbone.network.use=cramped", f"backbone.network.norm={norm}")
    return toy_recipe(GUESTS, "jem", "ebjdat", "sam", *network, *overrides)


def trained(path: Path, *overrides: str, **options: str) -> dict[str, Any]:
    """The last state of a run, without what the clock and the recipe wrote."""
    api.train(recipe(*overrides, **options), path, registry=GUESTS, latest=path.parent / "runs")
    state = load(path / "checkpoints" / "step-00000012")
    state["history"] = [{**entry, "seconds": 0} for entry in state["history"]]
    state.pop("config")
    return {**state, "seconds": 0}


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = (path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_run_that_runs_out_of_memory_is_one_begun_with_what_fits(tmp_path: Path) -> None:
    halved = trained(tmp_path / "a", "backbone.network.images=12")
    begun = trained(tmp_path / "b", "run.micro_batch=9")
    assert same(halved, begun)
    changes = [
        (event["step"], event["was"], event["images"]) for event in events(tmp_path / "a", "memory")
    ]
    assert changes == [(0, 36, 18), (0, 18, 9)]
    assert not events(tmp_path / "b", "memory")
    ended = [events(tmp_path / name, "end")[0]["figures"] for name in "ab"]
    assert [f["value"] for f in ended[0]] == [f["value"] for f in ended[1]]


def test_a_run_goes_on_with_the_halved_micro_batch(tmp_path: Path) -> None:
    trainer = Trainer(recipe("backbone.network.images=12"), RunFolder.create(tmp_path / "a"))
    trainer.run(until=3)
    other = Trainer(recipe("backbone.network.images=12"), RunFolder.create(tmp_path / "b"))
    other.load_state_dict(load(tmp_path / "a" / "checkpoints" / "step-00000003"))
    assert other.parts.micro.size == 9
    other.run(until=6)
    trainer.run(until=6)
    assert not events(tmp_path / "b", "memory")
    assert same(other.backbone.model.state_dict(), trainer.backbone.model.state_dict())


def test_a_recipe_that_asks_for_less_than_the_checkpoint_gets_it(tmp_path: Path) -> None:
    trainer = Trainer(recipe("run.micro_batch=4"), RunFolder.create(tmp_path / "a"))
    for saved, wanted in ((9, 4), (0, 4), (2, 2)):
        trainer.parts.micro.size = 4
        trainer.load_state_dict({**trainer.state_dict(), "micro_batch": saved})
        assert trainer.parts.micro.size == wanted


def test_a_single_image_that_does_not_fit_ends_a_run_that_is_saved(tmp_path: Path) -> None:
    trainers = [Trainer(recipe(), RunFolder.create(tmp_path / name)) for name in "ab"]
    trainers[0].run(until=4)
    network = trainers[1].backbone.model.network

    def another_program_takes_the_rest() -> bool:
        network.images = 0 if trainers[1].step == 4 else 1000
        return False

    trainers[1].stop = another_program_takes_the_rest
    trainers[1].polling.patience = float("inf")  # asked between steps alone, however slow they are
    with pytest.raises(OutOfMemory, match=r"with 1 image\(s\) in a pass.*Step 4 is saved"):
        trainers[1].run()
    states = [load(tmp_path / name / "checkpoints" / "step-00000004") for name in "ab"]
    assert states[1]["micro_batch"] == 1
    assert same(*({**state, "micro_batch": 0, "seconds": 0} for state in states))
    assert "a smaller network" in events(tmp_path / "b", "memory")[-1]["ended"]


def test_batch_norm_that_does_not_fit_as_a_whole_says_so(tmp_path: Path) -> None:
    trainer = Trainer(
        recipe("backbone.network.images=4", norm="batch"), RunFolder.create(tmp_path / "a")
    )
    with pytest.raises(OutOfMemory, match="batch norm computes its statistics over all of them"):
        trainer.run()


def test_an_update_that_has_begun_is_not_taken_again() -> None:
    done: list[int] = []

    def work() -> None:
        done.append(1)
        raise MemoryError

    with pytest.raises(OutOfMemory, match="which cannot be undone") as caught:
        MicroBatch().fit(work, moved=lambda: len(done))
    assert not caught.value.undone
    assert len(done) == 1


def in_a_group() -> dict[str, str]:
    with distributed.together():
        try:
            retry_on_oom(partial(failing, torch.OutOfMemoryError("CUDA out of memory")))
        except OutOfMemory as error:
            return {"told": str(error), "undone": str(error.undone)}
    return {}


def test_a_process_of_several_names_the_option_and_does_not_try_alone() -> None:
    for rank, answer in enumerate(every_rank(in_a_group)):
        assert f"process {rank} of 2 ran out of memory" in answer["told"]
        assert "--set run.micro_batch=" in answer["told"]
        assert answer["undone"] == "False"


class Cut(nn.Module):
    """A classifier of images with room for so many of them."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.inner, self.room = rowwise("none"), room

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} images")
        return self.inner(x).logits

    def __repr__(self) -> str:
        return "Cut()"


def test_an_evaluation_finds_the_same_in_less_memory() -> None:
    options: dict[str, Any] = {"attacks": ("pgd",), "only": ("robustness", "calibration")}
    options["options"] = {"robustness": {"indicators": False}}
    judge = partial(api.evaluate, dataset=TASK.images("valid"), n_classes=3, registry=REGISTRY)
    records = [judge(Cut(room), eps_px=25.5, **options) for room in (1000, 5)]
    values = [{f.name: f.value for f in record.figures} for record in records]
    assert values[0] == pytest.approx(values[1], abs=TINY)


class Climbed(Cut):
    """One that has room for any number of images of which no slope is asked."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else self.inner(x).logits


def test_an_attacked_batch_is_taken_again_by_itself() -> None:
    ctx = Context(gen(), Threat("Linf", 25.5), batch_size=8)
    images = []
    for room in (1000, 3):
        subject = pixel_model(Climbed(room).eval().requires_grad_(False))
        images.append(attacked(subject, PGD(steps=2), TASK.images("valid"), ctx).x_adv)
    assert close(*images)


def test_validation_keeps_to_the_micro_batch(tmp_path: Path) -> None:
    trainer = Trainer(recipe("run.micro_batch=2"), RunFolder.create(tmp_path / "a"))
    validator, network = trainer.validator(1), trainer.backbone.model.network
    validator.validate(6)
    validator.draw_grid(tmp_path / "grid.png")
    validator.draw_energies(tmp_path / "energies.svg")
    validator.judge({})
    assert network.largest == 2


def test_a_micro_batch_halved_in_validation_stays_halved_in_the_next(tmp_path: Path) -> None:
    trainer = Trainer(recipe("backbone.network.images=5"), RunFolder.create(tmp_path / "a"))
    trainer.validator(1).validate(6)
    learnt = trainer.parts.micro.size
    assert 0 < learnt <= 5
    trainer.backbone.model.network.largest = 0
    trainer.validator(2).validate(6)
    assert trainer.backbone.model.network.largest <= learnt
    assert trainer.parts.micro.size == learnt


@pytest.mark.parametrize("inside", [eval_mode, frozen_batch_stats])
def test_a_slice_is_computed_again_in_the_modes_that_it_had(inside: Any) -> None:
    """A loss may pass the model in a mode that is gone when its gradient is taken."""
    slopes = []
    for size in (0, 2):
        model = toy_model(TASK, SmallCNN(channels=2, norm="batch")).eval()
        if inside is eval_mode:
            model.train()
        with MicroBatch(size).active(), inside(model):
            energy = model(BATCH.x).energy.mean()
        energy.backward()
        slopes.append([p.grad for p in model.parameters()])
        assert model.training == (inside is eval_mode)
    for whole, sliced in zip(*slopes, strict=True):
        torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=1e-6)


def test_a_run_that_is_sick_where_memory_runs_out_goes_back_before_it_ends(tmp_path: Path) -> None:
    """What its unread metrics tell comes first: a sick step is not what the run is saved as."""
    trainer = Trainer(recipe("sentinel.quiet=1"), RunFolder.create(tmp_path / "a"))
    network = trainer.backbone.model.network

    def full_and_sick() -> bool:
        if trainer.step == 7:
            network.images = 0
            unread = ({"step": 6, "epoch": 2}, ["loss"], torch.tensor([float("nan")]))
            trainer.journal._rows.append(unread)
        return False

    trainer.stop = full_and_sick
    with pytest.raises(OutOfMemory):
        trainer.run()
    assert events(tmp_path / "a", "rollback")
    assert events(tmp_path / "a", "memory")[-1]["ended"]


def test_samples_are_the_same_in_less_memory(tmp_path: Path) -> None:
    trained(tmp_path / "a", "backbone.network.images=20")
    model = export(tmp_path / "a", which="last").folder
    config = model / "config.json"
    drawn = sample(model, registry=GUESTS, n=30, steps=3, device="cpu").pixels
    config.write_text(config.read_text().replace('"images": 20', '"images": 1000'))
    assert close(drawn, sample(model, registry=GUESTS, n=30, steps=3, device="cpu").pixels)


def test_a_loss_is_logged_as_if_it_were_whole() -> None:
    backbone = backbone_of("jem", network=SmallCNN(channels=2, norm="none"))
    draws = objective_of("ebjdat").draw(backbone, BATCH, gen())
    terms: list[Terms] = []
    for size in (0, 4):
        with MicroBatch(size).active():
            terms.append(objective_of("ebjdat").loss(backbone, BATCH, draws))
    assert terms[0].watched.keys() == terms[1].watched.keys()
    assert all(close(terms[0].watched[name], terms[1].watched[name]) for name in terms[0].watched)


def test_an_attack_in_slices_is_the_whole_attack() -> None:
    model = rowwise("none").double()
    attack = partial(PGD(steps=4).draw, model, lambda x: model(x).energy, BATCH.x.double())
    whole = attack(gen(), bounds=TASK.bounds, radius_px=8)
    with MicroBatch(4).active():
        assert close(attack(gen(), bounds=TASK.bounds, radius_px=8), whole)
