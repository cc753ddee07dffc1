"""Chains are the formulas of their papers, and leave everything else alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import image_batches, normal, seeds, uniform
from torch import Tensor
from toys import gen, linear_model

from jemkit import PYLD, SGLD, Bounds, MisfitError, ModelEnergy, SignDescent, chain, gradient, run
from jemkit.models.networks import MLP, SmallCNN, seeded_init
from jemkit.sampling.kernels import Boxed, L2Descent, Projected
from jemkit.testing import toy_model, toy_task

SAMPLERS = [SGLD(), SGLD(noise=0.0, clip=0.1), PYLD(), SignDescent(), L2Descent()]
TASK = toy_task()
steps = st.integers(0, 4)


def bowl(x: Tensor) -> Tensor:
    """E(x) = |x|^2 / 2, whose gradient is x."""
    return 0.5 * x.square().flatten(1).sum(1)


def smooth() -> ModelEnergy:
    return ModelEnergy(toy_model(TASK, SmallCNN(channels=2)).eval())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
@given(n=steps, m=steps, seed=seeds)
def test_a_chain_of_n_and_then_m_steps_is_one_of_n_plus_m(
    sampler: SGLD, n: int, m: int, seed: int
) -> None:
    energy, x, rng = smooth(), normal(seed, 2, *TASK.shape), gen(seed)
    two = run(sampler, energy, run(sampler, energy, x, rng, n), rng, m)
    assert torch.equal(two, run(sampler, energy, x, gen(seed), n + m))


@given(seed=seeds, step_size=st.floats(0, 2))
def test_sgld_without_noise_is_gradient_descent(seed: int, step_size: float) -> None:
    energy, x = smooth(), normal(seed, 3, *TASK.shape)
    leaf = x.clone().requires_grad_()
    energy(leaf).sum().backward()
    expected = x - step_size * leaf.grad
    assert torch.equal(SGLD(step_size=step_size, noise=0).step(energy, x, gen(seed)), expected)


@given(seed=seeds)
def test_sgld_without_noise_draws_no_number(seed: int) -> None:
    rng = gen(seed)
    before = rng.get_state()
    run(SGLD(noise=0), bowl, normal(seed, 2, 3), rng, 3)
    assert torch.equal(rng.get_state(), before)


@given(c=st.floats(0, 3), seed=seeds)
def test_langevin_ties_the_step_to_half_the_square_of_the_noise(c: float, seed: int) -> None:
    sampler = SGLD.langevin(c)
    assert (sampler.step_size, sampler.noise) == (c**2 / 2, c)
    x = normal(seed, 2, 4)
    n = torch.randn(x.shape, generator=gen(seed))  # Eq. 10, by hand
    expected = x - c**2 / 2 * x + c * n
    torch.testing.assert_close(sampler.step(bowl, x, gen(seed)), expected)


@given(seed=seeds)
def test_the_noise_has_the_requested_size_whatever_the_step(seed: int) -> None:
    x = torch.zeros(4000, 5)
    for step_size in (0.0, 1.0):
        moved = SGLD(step_size=step_size, noise=0.3).step(bowl, x, gen(seed))
        # 20,000 numbers: the standard error of a deviation is 0.3 / sqrt(40,000) = 0.0015
        assert abs(float(moved.std()) - 0.3) < 0.01
        assert abs(float(moved.mean())) < 0.02


@given(seed=seeds)
def test_a_small_step_without_noise_never_raises_the_energy(seed: int) -> None:
    energy, x = smooth(), uniform(seed, 2, *TASK.shape)
    states = [x, *chain(SGLD(step_size=0.01, noise=0), energy, x, gen(), 6)]
    values = torch.stack([energy(s) for s in states])
    assert (values.diff(dim=0) <= 1e-6).all()


@given(seed=seeds)
def test_a_vanishing_step_lowers_the_energy_by_the_step_times_the_squared_slope(seed: int) -> None:
    model = toy_model(TASK, MLP(hidden=8)).double().eval()
    energy, x = ModelEnergy(model), uniform(seed, 2, *TASK.shape).double()
    step_size = 1e-6
    fall = energy(x) - energy(SGLD(step_size=step_size, noise=0).step(energy, x, gen()))
    first_order = step_size * gradient(energy, x).square().flatten(1).sum(1)
    torch.testing.assert_close(fall.double(), first_order.double(), rtol=0.02, atol=1e-6)


@given(seed=seeds, clip=st.floats(0.05, 1))
def test_the_gradient_is_clipped_element_by_element_before_the_step(seed: int, clip: float) -> None:
    x = normal(seed, 3, 5)
    moved = SGLD(step_size=2.0, noise=0, clip=clip).step(bowl, x, gen())
    assert torch.equal(moved, x - 2.0 * x.clamp(-clip, clip))
    assert float((moved - x).abs().max()) <= 2 * clip + 1e-6


@given(seed=seeds, inner=st.integers(1, 5), clip=st.sampled_from([None, 0.01, 1.0]))
def test_pyld_on_a_linear_stem_is_noise_free_sgld_of_the_summed_step(
    seed: int, inner: int, clip: float | None
) -> None:
    model = steep(toy_model(TASK, SmallCNN(channels=2), seed=seed % 100)).double()
    energy, x = ModelEnergy(model), uniform(seed, 2, *TASK.shape).double()
    pyld = Boxed(PYLD(inner_steps=inner, step_size=0.2, clip=clip), Bounds())
    sgld = Boxed(SGLD(step_size=0.2 * inner, noise=0, clip=clip), Bounds())
    one, other = (run(s, energy, x, gen(), 3) for s in (pyld, sgld))
    # energies are float32, so their slopes hold 7 digits, summed `inner` times
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert float((one - x).abs().max()) > 5e-3  # far from standing still


@given(seed=seeds)
def test_pyld_of_one_inner_step_is_noise_free_sgld_whatever_the_stem(seed: int) -> None:
    energy, x = ModelEnergy(bent(seed % 100)), uniform(seed, 2, *TASK.shape)
    one = run(PYLD(inner_steps=1, step_size=0.5, clip=None), energy, x, gen(), 3)
    other = run(SGLD(step_size=0.5, noise=0), energy, x, gen(), 3)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert float((one - x).abs().max()) > 5e-3


def test_pyld_on_a_stem_that_is_not_linear_is_another_walk() -> None:
    energy, x = ModelEnergy(bent(0)), uniform(0, 2, *TASK.shape)
    one = run(PYLD(inner_steps=5, step_size=0.2, clip=None), energy, x, gen(), 1)
    other = run(SGLD(step_size=1.0, noise=0), energy, x, gen(), 1)
    assert float((one - other).abs().max()) > 1e-2


def bent(seed: int) -> torch.nn.Module:
    """A model whose first layer ends in a tanh."""
    model = steep(toy_model(TASK, SmallCNN(channels=2), seed=seed))
    model.network.first = torch.nn.Sequential(model.network.first, torch.nn.Tanh())
    return model


def steep(model: torch.nn.Module) -> torch.nn.Module:
    """Slopes that a half-trained network has; a fresh one is nearly flat."""
    with torch.no_grad():
        model.head.weight.mul_(30)
    return model.eval()


def test_pyld_asks_for_a_model_and_names_what_it_wants() -> None:
    with pytest.raises(MisfitError, match="ModelEnergy"):
        PYLD().step(bowl, torch.zeros(1, 2), gen())


@given(seed=seeds, size=st.floats(0.001, 1))
def test_sign_descent_moves_every_pixel_by_its_step(seed: int, size: float) -> None:
    x = normal(seed, 3, 5)
    moved = SignDescent(step_size=size).step(bowl, x, gen())
    assert torch.equal(moved, x - size * x.sign())


@given(seed=seeds, size=st.floats(0.001, 1))
def test_l2_descent_moves_every_row_by_its_step_and_a_flat_row_not_at_all(
    seed: int, size: float
) -> None:
    x = normal(seed, 3, 5)
    x[1] = 0  # the bowl is flat there
    moved = L2Descent(step_size=size).step(bowl, x, gen())
    length = (moved - x).norm(dim=1)
    torch.testing.assert_close(length, torch.tensor([size, 0.0, size]), rtol=1e-4, atol=1e-5)


@given(
    x=image_batches(-2, 2), seed=seeds, radius=st.floats(0, 1), norm=st.sampled_from(["Linf", "L2"])
)
def test_projection_is_idempotent_and_lands_in_ball_and_range(
    x: Tensor, seed: int, radius: float, norm: str
) -> None:
    centre = uniform(seed, *x.shape)
    kernel = Projected(SGLD(), centre, radius, Bounds(), norm)
    once = kernel.project(x)
    torch.testing.assert_close(kernel.project(once), once, rtol=0, atol=1e-6)
    assert once.abs().max() <= 1
    order = 2.0 if norm == "L2" else math.inf
    size = (once - centre).flatten(1).norm(order, dim=1)
    assert (size <= radius * (1 + 1e-5) + 1e-6).all()


@given(seed=seeds, norm=st.sampled_from(["Linf", "L2"]))
def test_a_point_inside_the_ball_is_where_projection_leaves_it(seed: int, norm: str) -> None:
    centre = uniform(seed, 2, 1, 3, 3, low=-0.5, high=0.5)
    x = centre + 0.01 * normal(seed + 1, 2, 1, 3, 3).clamp(-1, 1)
    kernel = Projected(SGLD(), centre, 0.5, Bounds(), norm)
    torch.testing.assert_close(kernel.project(x), x, rtol=0, atol=1e-6)


@given(seed=seeds, low=st.floats(-2, 0), width=st.floats(0.1, 2))
def test_a_box_keeps_a_chain_in_the_range(seed: int, low: float, width: float) -> None:
    box = Boxed(SGLD(step_size=1, noise=2.0), Bounds(low, low + width))
    for x in chain(box, bowl, normal(seed, 3, 4), gen(seed), 3):
        assert x.min() >= low - 1e-6
        assert x.max() <= low + width + 1e-6


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_a_chain_ends_detached_contiguous_finite_and_in_its_precision(sampler: SGLD) -> None:
    energy = smooth()
    leaf = normal(0, 3, *TASK.shape).requires_grad_()
    before = leaf.detach().clone()
    x = run(sampler, energy, leaf, gen(), 3)
    assert not x.requires_grad
    assert x.is_contiguous()
    assert x.isfinite().all()
    assert x.dtype == leaf.dtype
    assert torch.equal(leaf, before)
    assert leaf.grad is None


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_a_chain_leaves_gradients_of_parameters_as_they_were(sampler: SGLD) -> None:
    energy = smooth()
    some, *others = energy.model.parameters()
    some.grad = torch.full_like(some, 7.0)
    run(sampler, energy, normal(0, 3, *TASK.shape), gen(), 3)
    assert torch.equal(some.grad, torch.full_like(some, 7.0))
    assert all(p.grad is None for p in others)
    assert all(p.requires_grad for p in energy.model.parameters())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_a_chain_knows_no_random_state_but_the_generator_it_was_given(sampler: SGLD) -> None:
    energy, x = smooth(), normal(0, 3, *TASK.shape)
    own = torch.get_rng_state()
    first = run(sampler, energy, x, gen(), 3)
    assert torch.equal(torch.get_rng_state(), own)
    with torch.random.fork_rng():
        torch.rand(7)
        assert torch.equal(run(sampler, energy, x, gen(), 3), first)


def test_every_state_of_a_chain_is_detached_even_from_a_leaf() -> None:
    leaf = normal(0, 2, 3).requires_grad_()
    for sampler in (SGLD(), SignDescent(), L2Descent()):
        assert not any(x.requires_grad for x in chain(sampler, bowl, leaf, gen(), 3))


def test_no_steps_give_the_beginning_back() -> None:
    x = normal(0, 2, 3)
    assert torch.equal(run(SGLD(), bowl, x, gen(), 0), x)
    assert list(chain(SGLD(), bowl, x, gen(), 0)) == []


def test_an_empty_batch_walks_too() -> None:
    assert run(SGLD(), bowl, torch.zeros(0, 3), gen(), 2).shape == (0, 3)


@given(seed=seeds)
def test_the_energy_of_a_linear_model_falls_along_minus_its_expected_weights(seed: int) -> None:
    model = linear_model(12, 3, seed)
    x = normal(seed, 2, 1, 3, 4)
    slope = gradient(ModelEnergy(model), x)
    p = model(x).logits.softmax(1)
    torch.testing.assert_close(slope.flatten(1), -(p @ model.head.weight), rtol=1e-4, atol=1e-5)


def test_weights_are_drawn_from_the_given_generator() -> None:
    with seeded_init(gen(3)):
        one = MLP(hidden=4).build((1, 2, 2))
    with seeded_init(gen(3)):
        other = MLP(hidden=4).build((1, 2, 2))
    assert torch.equal(one.first.weight, other.first.weight)
