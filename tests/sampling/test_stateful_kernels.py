"""Kernels with a state: what they carry stays in their chain, and what they report is logged."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds, uniform
from torch import Generator, Tensor
from toys import gen

from jemkit import (
    MALA,
    SGLD,
    Bounds,
    Boxed,
    ModelEnergy,
    Options,
    Projected,
    SGLDMomentum,
    SignDescent,
    chain,
    gradient,
    run,
)  # fmt: skip
from jemkit.sampling.compile import CompiledGradient
from jemkit.sampling.kernels import eager_gradient, gradients_by
from jemkit.sampling.reports import reports
from jemkit.sampling.stateful_kernels import MALAState, MomentumState
from jemkit.testing import check_sampler, toy_model, toy_task

TASK = toy_task()
KERNELS = [SGLDMomentum(), SGLDMomentum(clip=0.1, noise=0.0), MALA(step_size=0.1, temperature=1.0)]


def bowl(x: Tensor) -> Tensor:
    """E(x) = |x|^2 / 2, whose gradient is x: a standard normal distribution at temperature 1."""
    return 0.5 * x.square().flatten(1).sum(1)


def away(x: Tensor) -> Tensor:
    """The same around 3."""
    return bowl(x - 3)


class Count(NamedTuple):
    x: Tensor
    steps: int
    info: dict[str, Tensor]


class Counting(Options):
    """Adds 1, 2, 3, ... and reports how many steps it took."""

    needs_stem: bool = False
    scale: float = 1.0

    def init(self, x: Tensor, rng: Generator) -> Count:
        return Count(x, 0, {})

    def step(self, energy: Any, state: Count, rng: Generator) -> Count:
        n = state.steps + 1
        return Count(state.x + self.scale * n, n, {"steps": torch.full((len(state.x),), n)})


class TestAChain:
    def test_carries_the_kernels_state_from_step_to_step_and_gives_x(self) -> None:
        result = list(chain(Counting(), bowl, torch.zeros(2, 3), gen(), 4))
        assert [float(x[0, 0]) for x in result] == [1, 3, 6, 10]

    def test_begins_with_a_fresh_state(self) -> None:
        x = torch.zeros(2, 3)
        assert torch.equal(run(Counting(), bowl, x, gen(), 2), x + 3)
        assert torch.equal(run(Counting(), bowl, x, gen(), 2), x + 3)

    @pytest.mark.parametrize("kernel", KERNELS, ids=repr)
    def test_of_no_step_gives_x_back(self, kernel: Any) -> None:
        x = normal(0, 2, 3)
        assert torch.equal(run(kernel, bowl, x, gen(), 0), x)

    @pytest.mark.parametrize("kernel", KERNELS, ids=repr)
    @pytest.mark.parametrize("shape", [(0, 3), (1, 3), (2, 1, 4, 4)])
    def test_takes_rows_of_any_shape(self, kernel: Any, shape: tuple[int, ...]) -> None:
        assert run(kernel, bowl, torch.zeros(shape), gen(), 2).shape == shape

    def test_detaches_every_tensor_of_the_state(self) -> None:
        class Attached(SGLDMomentum):
            def step(self, energy: Any, state: MomentumState, rng: Generator) -> MomentumState:
                assert not any(t.requires_grad for t in state)
                x, velocity = super().step(energy, state, rng)
                return MomentumState(x.requires_grad_(), velocity.requires_grad_())

        x = run(Attached(), bowl, normal(0, 2, 3), gen(), 3)
        assert not x.requires_grad

    @pytest.mark.parametrize("kernel", KERNELS, ids=repr)
    def test_of_another_gradient_takes_that_one(self, kernel: Any) -> None:
        recorded: list[int] = []

        def counted(energy: Any, x: Tensor) -> Tensor:
            recorded.append(len(x))
            return eager_gradient(energy, x)

        with gradients_by(counted):
            run(kernel, bowl, torch.ones(2, 3), gen(), 3)
        assert len(recorded) == 3 * (2 if isinstance(kernel, MALA) else 1)

    def test_of_compiled_gradients_is_the_eager_one(self) -> None:
        energy, x = ModelEnergy(toy_model(TASK).eval()), uniform(0, 4, *TASK.shape)
        kernel = Boxed(SGLDMomentum(), TASK.bounds)
        eager = run(kernel, energy, x, gen(), 3)
        with gradients_by(CompiledGradient("eager")):
            torch.testing.assert_close(run(kernel, energy, x, gen(), 3), eager)


class TestWrappers:
    @pytest.mark.parametrize("kernel", [*KERNELS, Counting(scale=0.3)], ids=repr)
    def test_move_the_x_of_a_state_and_leave_the_rest(self, kernel: Any) -> None:
        x, bounds = uniform(0, 4, 1, 3, 3), Bounds()
        for wrapped in (Boxed(kernel, bounds), Projected(kernel, x, 0.1, bounds)):
            state, inner = wrapped.init(x, gen()), kernel.init(x, gen())
            result, expected = wrapped.step(bowl, state, gen()), kernel.step(bowl, inner, gen())
            assert type(result) is type(expected)
            assert repr(result[1:]) == repr(expected[1:])
            assert result.x.abs().max() <= 1

    @pytest.mark.parametrize("kernel", KERNELS, ids=repr)
    def test_hold_every_x_of_a_chain_in_ball_and_range(self, kernel: Any) -> None:
        x = uniform(0, 4, 1, 3, 3)
        for at in chain(Projected(kernel, x, 0.1, Bounds()), bowl, x, gen(), 5):
            assert (at - x).abs().max() <= 0.1 + 1e-6
            assert at.abs().max() <= 1

    def test_nest(self) -> None:
        x = torch.zeros(2, 1, 2, 2)
        kernel = Projected(Boxed(Counting(), Bounds(-5, 5)), x, 2.5, Bounds(-9, 9))
        value = [float(at.max()) for at in chain(kernel, bowl, x, gen(), 3)]
        assert value == [1, 2.5, 2.5]

    @pytest.mark.parametrize("kernel", KERNELS, ids=repr)
    def test_keep_the_laws_of_a_kernel(self, kernel: Any) -> None:
        check_sampler(kernel)
        check_sampler(Boxed(kernel, TASK.bounds))
        check_sampler(Boxed(SGLD(), TASK.bounds))


class TestReports:
    def test_are_a_mean_for_each_step_by_name(self) -> None:
        with reports() as recorded:
            run(Counting(), bowl, torch.zeros(2, 3), gen(), 3)
            run(Boxed(Counting(), Bounds()), bowl, torch.zeros(2, 3), gen(), 2, name="ascent")
        assert {name: [float(v) for v in values] for name, values in recorded.items()} == {
            "sampler/steps": [1, 2, 3],
            "ascent/steps": [1, 2],
        }

    def test_are_nothing_of_a_kernel_that_reports_nothing(self) -> None:
        with reports() as recorded:
            run(SignDescent(), bowl, torch.zeros(2, 3), gen(), 3)
            run(SGLDMomentum(), bowl, torch.zeros(2, 3), gen(), 3)
        assert recorded == {}

    def test_end_with_the_block(self) -> None:
        with reports() as outer:
            with reports() as inner:
                run(Counting(), bowl, torch.zeros(2, 3), gen(), 1)
            assert outer == {}
        run(Counting(), bowl, torch.zeros(2, 3), gen(), 1)
        assert len(inner["sampler/steps"]) == 1


class TestMomentum:
    @given(seed=seeds, clip=st.sampled_from([None, 0.1]), noise=st.sampled_from([0.0, 0.3]))
    def test_of_0_is_sgld(self, seed: int, clip: float | None, noise: float) -> None:
        x = normal(seed, 2, 3)
        ours = SGLDMomentum(step_size=0.7, momentum=0.0, noise=noise, clip=clip)
        theirs = SGLD(step_size=0.7, noise=noise, clip=clip)
        result, expected = (run(k, bowl, x, gen(seed), 4) for k in (ours, theirs))
        torch.testing.assert_close(result, expected)

    @given(seed=seeds)
    def test_is_carried_over_two_steps_as_by_hand(self, seed: int) -> None:
        x = normal(seed, 2, 3)
        v1 = -0.2 * x
        x1 = x + v1
        v2 = 0.5 * v1 - 0.2 * x1
        kernel = SGLDMomentum(step_size=0.2, momentum=0.5, noise=0.0)
        torch.testing.assert_close(run(kernel, bowl, x, gen(), 2), x1 + v2)

    def test_tends_to_the_step_of_sgld_under_a_constant_gradient(self) -> None:
        slope = torch.tensor([1.0, -2.0, 0.5])
        kernel = SGLDMomentum(noise=0.0)
        *_, before, after = chain(kernel, lambda x: x @ slope, torch.zeros(1, 3), gen(), 200)
        one = SGLD(noise=0.0).step(lambda x: x @ slope, before, gen())
        torch.testing.assert_close(after, one, rtol=1e-4, atol=1e-4)


def moments(kernel: Any, energy: Any, steps: int = 60) -> tuple[float, float]:
    """Mean and variance of 16,000 numbers that chains end with."""
    x = run(kernel, energy, torch.zeros(8000, 2), gen(), steps)
    return float(x.mean()), float(x.var())


class TestMALA:
    @pytest.mark.parametrize("temperature", [1.0, 0.25])
    def test_has_the_right_mean_and_variance_where_langevin_without_it_is_biased(
        self, temperature: float
    ) -> None:
        size = 0.8
        # standard errors of 16,000 numbers: 0.008 of the mean, 0.011 of the variance
        mean, variance = moments(MALA(step_size=size, temperature=temperature), away)
        assert abs(mean - 3) < 0.04
        assert abs(variance / temperature - 1) < 0.05
        noise = math.sqrt(2 * temperature * size)
        mean, variance = moments(SGLD(step_size=size, noise=noise), away)
        assert abs(mean - 3) < 0.04
        assert abs(variance / temperature - 2 / (2 - size)) < 0.08  # 1.67: its own fixed point

    def test_is_right_where_the_energy_is_no_square(self) -> None:
        def quartic(x: Tensor) -> Tensor:
            return x.pow(4).sum(1)

        # E[x^2] under exp(-x^4) is gamma(3/4) / gamma(1/4)
        expected = math.gamma(0.75) / math.gamma(0.25)
        _, variance = moments(MALA(step_size=0.15, temperature=1.0), quartic, 200)
        assert abs(variance / expected - 1) < 0.05

    @given(seed=seeds, size=st.floats(0.01, 1.5), temperature=st.floats(0.1, 2))
    def test_accepts_with_the_ratio_of_metropolis_and_hastings(
        self, seed: int, size: float, temperature: float
    ) -> None:
        def energy(x: Tensor) -> Tensor:
            return (x.pow(4) + x).sum(1)

        def log_q(to: Tensor, x: Tensor) -> Tensor:
            far = to - x + size * gradient(energy, x)
            return -far.square().sum(1) / (4 * size * temperature)

        x, rng = uniform(seed, 4, 3).double(), gen(seed)
        state = MALA(step_size=size, temperature=temperature).step(
            energy, MALAState(x, {}), gen(seed)
        )
        noise = torch.randn(x.shape, generator=rng, dtype=x.dtype)
        to = x - size * gradient(energy, x) + math.sqrt(2 * size * temperature) * noise
        log_ratio = (energy(x) - energy(to)) / temperature + log_q(x, to) - log_q(to, x)
        expected = log_ratio.clamp(max=0).exp()
        torch.testing.assert_close(state.info["acceptance"], expected)
        u = torch.rand(4, generator=rng, dtype=x.dtype)
        torch.testing.assert_close(state.x, torch.where((u < expected)[:, None], to, x))

    def test_accepts_each_image_by_itself(self) -> None:
        x = normal(0, 64, 1, 2, 2)
        state = MALA(step_size=1.2, temperature=1.0).step(bowl, MALAState(x, {}), gen(1))
        stayed = (state.x == x).flatten(1).all(1)
        moved = (state.x != x).flatten(1).all(1)
        assert (stayed | moved).all()
        assert 0 < int(stayed.sum()) < 64

    def test_accepts_nearly_all_of_small_steps_and_few_of_large_ones(self) -> None:
        x = normal(0, 500, 8)
        rates = []
        for size in (0.01, 5.0):
            state = MALA(step_size=size, temperature=1.0).step(bowl, MALAState(x, {}), gen(1))
            rates.append(float(state.info["acceptance"].mean()))
        assert rates[0] > 0.99
        assert rates[1] < 0.05

    def test_hides_no_energy_that_is_not_a_number(self) -> None:
        def broken(x: Tensor) -> Tensor:
            return bowl(x) * torch.where(x[:, 0] > 0, torch.nan, 1.0)

        with reports() as recorded:
            x = run(MALA(step_size=0.5, temperature=1.0), broken, -torch.ones(200, 2), gen(), 9)
        assert x.isnan().any()
        assert recorded["sampler/acceptance"][-1].isnan()

    def test_makes_sglds_proposals_by_default(self) -> None:
        """At its default temperature the noise is SGLD's."""
        x = normal(0, 3, 4)
        state = MALA().step(lambda x: 0 * bowl(x), MALAState(x, {}), gen())
        torch.testing.assert_close(state.x, SGLD().step(lambda x: 0 * bowl(x), x, gen()))
