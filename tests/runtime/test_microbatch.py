"""A micro-batch changes how much memory a pass takes and nothing else."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, uniform
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from toys import (
    UPDATERS,
    Room,
    backbone_of,
    gen,
    objective_of,
    updater_of,
)

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
    run,
    train_step,
)  # fmt: skip
from jemkit.attacks.pixel_model import PixelModel
from jemkit.attacks.purification import Refined, Refinement
from jemkit.models.networks import SmallCNN
from jemkit.models.norms import Norm
from jemkit.runtime.microbatch import MicroBatch
from jemkit.runtime.modes import eval_mode, frozen, frozen_batch_stats
from jemkit.runtime.pytree import same
from jemkit.sampling.compile import CompiledGradient
from jemkit.sampling.density import Contrastive
from jemkit.sampling.kernels import L2Descent, Sampler
from jemkit.testing import toy_batch, toy_model, toy_task
from jemkit.training.objective_contexts import in_bf16

TASK = toy_task()
B = 6
BATCH = toy_batch(TASK, B, positives=4)
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
def test_an_update_in_slices_is_the_whole_update(objective: str, updater: str) -> None:
    whole, sliced = (updated(n, objective, updater, "group") for n in (0, 4))
    assert all(close(sliced[name], t) for name, t in whole.items())


def test_an_update_image_by_image_is_the_whole_update() -> None:
    whole, sliced = (updated(n, "ebjdat", "sam", "group") for n in (0, 1))
    assert all(close(sliced[name], t) for name, t in whole.items())


def test_terms_that_are_no_mean_over_rows_are_exact_too() -> None:
    whole, sliced = (updated(n, "ebjdat", "sam", "none", outer="squared") for n in (0, 2))
    assert all(close(sliced[name], t) for name, t in whole.items())


@pytest.mark.parametrize("seed", range(4))
def test_slices_run_in_the_precision_of_the_whole(seed: int) -> None:
    """Not of SAM, whose second pass begins where the rounding of the first one led."""
    results = []
    for size in (0, 2):
        backbone = backbone_of("jem", network=SmallCNN(channels=2, norm="group"))
        objective, model = in_bf16(objective_of("jem"), "cpu"), backbone.model
        before = parameters_to_vector(model.parameters()).detach().clone()
        with MicroBatch(size).active():
            terms = train_step(
                backbone, objective, updater_of("plain", model), BATCH, gen(seed), Guard()
            )
        results.append((parameters_to_vector(model.parameters()).detach() - before, terms.total))
    (whole, one), (sliced, other) = results
    assert torch.allclose(one, other, atol=TINY)  # in float32 it is 1e-3 off
    rounding = torch.finfo(torch.bfloat16).eps  # of gradients that are summed slice by slice
    assert (sliced - whole).norm() < rounding * whole.norm()


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
