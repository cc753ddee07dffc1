"""Updaters move the weights as their formulas say, and the guard lets nothing else through."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode
from toys import UPDATERS, backbone_of, gen, objective_of, tiny, updater_of

from jemkit import SAM, Diverged, Guard, Plain, Terms, train_step
from jemkit.runtime.tensors import cloned
from jemkit.testing import toy_batch, toy_model, toy_task
from jemkit.updaters import EMA, moved_weights, total_norm

TASK = toy_task()


def bowl(w: nn.Parameter) -> Terms:
    """|w|^2 / 2, with gradient w."""
    return Terms.weighted({"bowl": (1.0, 0.5 * w.square().sum())})


class Holder(nn.Module):
    """A model of one weight."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(value.clone())


def stepped(spec: object, value: Tensor, lr: float = 0.1) -> Tensor:
    model = Holder(value)
    updater = spec.build(model, SGD(model.parameters(), lr=lr))
    updater.step(lambda: bowl(model.w), Guard())
    return model.w.detach()


@given(seed=seeds)
def test_plain_descent_is_the_optimizers_own_step(seed: int) -> None:
    w = normal(seed, 5)
    torch.testing.assert_close(stepped(Plain(), w), w - 0.1 * w)


@given(seed=seeds, adaptive=st.booleans())
def test_sam_of_radius_zero_is_plain_descent(seed: int, adaptive: bool) -> None:
    w = normal(seed, 5)
    assert torch.equal(stepped(SAM(rho=0, adaptive=adaptive), w), stepped(Plain(), w))


@given(seed=seeds)
def test_awp_of_gamma_zero_is_plain_descent(seed: int) -> None:
    w = normal(seed, 3, 4)
    assert torch.equal(stepped(tiny("updater", "awp", gamma=0), w), stepped(Plain(), w))


@given(seed=seeds, rho=st.floats(0.01, 2))
def test_sam_descends_by_the_gradient_at_the_worst_point_nearby(seed: int, rho: float) -> None:
    w = normal(seed, 5)
    worst = w * (1 + rho / w.norm())  # of a bowl: further out along w, where the gradient is it
    torch.testing.assert_close(stepped(SAM(rho=rho), w), w - 0.1 * worst)


@given(seed=seeds, rho=st.floats(0.01, 2))
def test_adaptive_sam_climbs_in_proportion_to_each_weight(seed: int, rho: float) -> None:
    w = normal(seed, 5)
    worst = w + rho * w.square() * w / (w.abs() * w).norm()  # Kwon et al. 2021, Eq. 4
    torch.testing.assert_close(stepped(SAM(rho=rho, adaptive=True), w), w - 0.1 * worst)


@given(seed=seeds, gamma=st.floats(0.001, 0.1))
def test_awp_moves_each_matrix_by_a_share_of_its_own_norm(seed: int, gamma: float) -> None:
    w = normal(seed, 3, 4)
    worst = w + gamma * w.norm() * w / w.norm()
    torch.testing.assert_close(stepped(tiny("updater", "awp", gamma=gamma), w), w - 0.1 * worst)
    bias = normal(seed, 5)  # a vector is no matrix: it stays
    assert torch.equal(stepped(tiny("updater", "awp", gamma=gamma), bias), stepped(Plain(), bias))


@pytest.mark.parametrize("name", UPDATERS)
def test_at_a_rate_of_zero_without_decay_the_weights_stay_bit_for_bit(name: str) -> None:
    model = toy_model(TASK).train()
    before = [p.detach().clone() for p in model.parameters()]
    updater = tiny("updater", name).build(model, SGD(model.parameters(), lr=0.0, momentum=0.9))
    batch = toy_batch(TASK)
    for _ in range(3):
        updater.step(lambda: energies(model, batch.x), Guard())
    assert all(map(torch.equal, before, model.parameters()))


def energies(model: nn.Module, x: Tensor) -> Terms:
    return Terms.weighted({"E": (1.0, model(x).energy.mean())})


@pytest.mark.parametrize("name", UPDATERS)
def test_a_gradient_of_zero_makes_no_nan(name: str) -> None:
    model = Holder(torch.zeros(2, 3))
    updater = tiny("updater", name).build(model, SGD(model.parameters(), lr=0.1))
    updater.step(lambda: bowl(model.w), Guard())
    assert torch.equal(model.w, torch.zeros(2, 3))


@pytest.mark.parametrize("name", UPDATERS)
def test_a_parameter_that_no_term_reaches_is_skipped(name: str) -> None:
    model = toy_model(TASK).train()
    model.unused = nn.Linear(3, 3)
    before = model.unused.weight.detach().clone()
    updater_of(name, model).step(lambda: energies(model, toy_batch(TASK).x), Guard())
    assert model.unused.weight.grad is None
    assert torch.equal(model.unused.weight, before)


@pytest.mark.parametrize("name", UPDATERS)
def test_running_statistics_learn_in_the_first_pass_alone(name: str) -> None:
    batch, once, model = toy_batch(TASK), toy_model(TASK).train(), toy_model(TASK).train()
    once(batch.x)
    updater_of(name, model).step(lambda: energies(model, batch.x), Guard())
    for (n, b), (_, expected) in zip(model.named_buffers(), once.named_buffers(), strict=True):
        assert torch.equal(b, expected), n


@pytest.mark.parametrize("name", ["sam", "awp"])
def test_both_passes_take_the_same_draws_and_the_same_weights_of_the_terms(name: str) -> None:
    backbone, batch = backbone_of("sadajem"), toy_batch(TASK)
    objective = Spy(objective_of("ebjdat"))
    train_step(backbone, objective, updater_of(name, backbone.model), batch, gen(), Guard())
    (first, one), (second, other) = objective.calls
    assert first is second
    assert list(one.parts) == list(other.parts)
    assert [w for w, _ in one.parts.values()] == [w for w, _ in other.parts.values()]


class Spy:
    """An objective that keeps what it was asked."""

    def __init__(self, inner: object) -> None:
        self.inner, self.calls, self.drawn = inner, [], 0
        self.needs_density = inner.needs_density

    def draw(self, *arguments: object) -> object:
        self.drawn += 1
        return self.inner.draw(*arguments)

    def loss(self, backbone: object, batch: object, draws: object) -> Terms:
        terms = self.inner.loss(backbone, batch, draws)
        self.calls.append((draws, terms))
        return terms


@pytest.mark.parametrize(("name", "passes"), [("plain", 1), ("sam", 2), ("awp", 2)])
def test_m_theta_updates_draw_once_and_make_m_steps(name: str, passes: int) -> None:
    backbone, guard, batch = backbone_of("sadajem"), Guard(), toy_batch(TASK)
    objective = Spy(objective_of("ebjdat"))
    updater = updater_of(name, backbone.model)
    terms = train_step(backbone, objective, updater, batch, gen(), guard, theta_steps=3)
    assert objective.drawn == 1
    assert len(objective.calls) == 3 * passes
    assert guard.updates == 3
    assert torch.equal(terms.total, objective.calls[0][1].total)


@given(seed=seeds)
def test_moved_weights_come_back_bit_for_bit_even_after_an_error(seed: int) -> None:
    model = Holder(normal(seed, 4))
    before = model.w.detach().clone()
    shift = normal(seed + 1, 4, scale=1e6)  # adding and subtracting this would lose digits

    def fails() -> None:
        with moved_weights({model.w: shift}):
            assert torch.equal(model.w, before + shift)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.equal(model.w, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", UPDATERS)
def test_a_loss_that_is_not_finite_changes_no_weight_and_names_its_term(
    name: str, bad: float
) -> None:
    model = Holder(normal(0, 2, 3))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    updater, guard = tiny("updater", name).build(model, optimizer), Guard()
    updater.step(lambda: bowl(model.w), guard)
    before = model.w.detach().clone()
    momentum = optimizer.state[model.w]["momentum_buffer"].clone()

    def sick() -> Terms:
        fine = 0.5 * model.w.square().sum()
        return Terms.weighted({"fine": (1.0, fine), "h1": (0.5, fine + bad)})

    with pytest.raises(Diverged, match=r"update 2: not finite: h1 = (nan|inf|-inf)"):
        updater.step(sick, guard)
    assert torch.equal(model.w, before)
    assert torch.equal(optimizer.state[model.w]["momentum_buffer"], momentum)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_stopped_too() -> None:
    model = Holder(torch.zeros(2))
    updater = Plain().build(model, SGD(model.parameters(), lr=0.1))
    with pytest.raises(Diverged, match="the gradient"):
        updater.step(lambda: Terms.weighted({"root": (1.0, model.w.sqrt().sum())}), Guard())
    assert torch.equal(model.w, torch.zeros(2))


@given(seed=seeds, n=st.integers(0, 4))
def test_the_gradient_norm_is_that_of_all_gradients_together(seed: int, n: int) -> None:
    grads = [normal(seed + i, 3, 2) for i in range(n)]
    flat = torch.cat([torch.zeros(1), *(g.flatten() for g in grads)])
    torch.testing.assert_close(total_norm(grads, flat), flat.norm())


@given(decay=st.floats(0, 0.99), seed=seeds)
def test_the_average_of_weights_is_exponential(decay: float, seed: int) -> None:
    model = Holder(torch.zeros(3))
    ema, values, expected = EMA(model, decay), normal(seed, 4, 3), torch.zeros(3)
    for value in values:
        with torch.no_grad():
            model.w.copy_(value)
        ema.update(model)
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.average["w"], expected)
    with ema.applied(model):
        torch.testing.assert_close(model.w.detach(), expected)
    assert torch.equal(model.w, values[-1])


def test_the_decay_rises_by_the_number_of_updates_by_hand() -> None:
    model = Holder(torch.zeros(1))
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.w.fill_(1.0)
    averages = []
    for n in (0, 1, 8, 100):
        ema.update(model, n)
        averages.append(float(ema.average["w"]))
    # what is left of 0: 1 / 10, 2 / 11, 9 / 18, and from there on the decay itself
    left = [0.1, 0.1 * 2 / 11, 0.1 * 2 / 11 / 2, 0.1 * 2 / 11 / 4]
    assert averages == pytest.approx([1 - x for x in left])


def test_the_average_takes_buffers_as_they_are() -> None:
    model = toy_model(TASK).train()
    ema = EMA(model, 0.9)
    model(toy_batch(TASK).x)
    ema.update(model)
    assert all(torch.equal(ema.average[n], b) for n, b in model.named_buffers())


class Motley(nn.Module):
    """Weights and buffers of several types and layouts, one of them under two names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.narrow = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        self.tail = nn.Linear(4, 2)
        self.tail.weight = self.head.weight
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.scatter(seed)

    @torch.no_grad()
    def scatter(self, seed: int) -> None:
        rng = gen(seed)
        for t in self.state_dict().values():
            t.copy_((torch.randn(t.shape, generator=rng) * 3).to(t.dtype))


@given(seed=seeds, decay=st.floats(0, 0.9999))
def test_an_average_is_bit_for_bit_that_of_tensor_by_tensor(seed: int, decay: float) -> None:
    model = Motley(seed)
    ema = EMA(model, decay)
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    for turn in range(3):
        model.scatter(seed + turn + 1)
        ema.update(model)
        for name, t in model.state_dict().items():
            if name in dict(model.named_parameters(remove_duplicate=False)):
                expected[name].lerp_(t, 1 - decay)
            else:
                expected[name].copy_(t)
    assert ema.average.keys() == expected.keys()
    for name, t in expected.items():
        assert torch.equal(ema.average[name], t), name
        assert ema.average[name].stride() == t.stride(), name


def test_a_weight_under_two_names_is_averaged_under_both() -> None:
    model = Motley(0)
    ema = EMA(model, 0.5)
    model.scatter(1)
    ema.update(model)
    with ema.applied(model):
        assert torch.equal(model.head.weight, ema.average["head.weight"])
    assert torch.equal(ema.average["head.weight"], ema.average["tail.weight"])


class Calls(TorchDispatchMode):
    """Counts the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func._overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def test_an_average_takes_as_many_kernels_however_many_weights_there_are() -> None:
    recorded = []
    for layers in (1, 5):
        norms = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(layers)]
        model = nn.Sequential(*norms)
        ema = EMA(model, 0.9)
        with Calls() as watch:
            ema.update(model)
        recorded.append({n: c for n, c in watch.calls.items() if n != "aten.detach"})
    assert recorded == 2 * [{"aten._foreach_lerp_": 1, "aten._foreach_copy_": 2}]


@given(seed=seeds)
def test_clones_are_bit_for_bit_and_of_their_own(seed: int) -> None:
    whole = [t.detach() for t in Motley(seed).state_dict().values()]
    whole.append(torch.tensor([math.nan, math.inf, -0.0]))
    result = cloned(whole)
    for copy, t in zip(result, whole, strict=True):
        wanted = t.clone()
        assert copy.dtype == t.dtype
        assert copy.stride() == wanted.stride()
        assert copy.data_ptr() != t.data_ptr()
        torch.testing.assert_close(copy, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", UPDATERS)
def test_updaters_compose_with_any_optimizer_and_lower_the_loss(name: str) -> None:
    model, batch = toy_model(TASK).train(), toy_batch(TASK, 12)
    updater = tiny("updater", name).build(model, Adam(model.parameters(), lr=0.01))

    def terms() -> Terms:
        return Terms.weighted({"CE": (1.0, F.cross_entropy(model(batch.x).logits, batch.y))})

    before, guard = float(terms().total.detach()), Guard()
    for _ in range(30):
        updater.step(terms, guard)
    assert float(terms().total.detach()) < 0.7 * before
    assert guard.updates == 30
