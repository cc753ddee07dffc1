"""The buffer keeps what chains left in it, and the density's loss is Eq. 9."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds, weights
from torch import Tensor
from toys import BACKBONES, backbone_of, gen, linear_model, toy_recipe, toy_registry

from jemkit import SGLD, Bounds, Buffer, ConfigError, Contrastive, MisfitError, ReplayBuffer
from jemkit.runtime.modes import batch_norms
from jemkit.runtime.pytree import same
from jemkit.sampling.init_dists import Uniform, UniformStart
from jemkit.testing import toy_backbone, toy_batch, toy_task
from jemkit.testing.law import state_of
from jemkit.training.build import build_run

TASK = toy_task()
CAPACITY = "backbone.buffer.capacity"


class Marked:
    """A start whose images all are one value, so that a restart can be seen."""

    def __init__(self, value: float, *shape: int) -> None:
        self.value, self.shape = value, shape or (1,)
        self.classes: list[Tensor | None] = []

    def draw(self, n: int, rng: torch.Generator, y: Tensor | None = None) -> Tensor:
        self.classes.append(y)
        return torch.full((n, *self.shape), self.value)


def buffer(n_classes: int = 3, value: float = 9.0, **options: object) -> ReplayBuffer:
    """A buffer in which slot i holds i."""
    built = ReplayBuffer(Buffer(**options), Marked(value), n_classes, gen())
    built.states = torch.arange(len(built.states)).float().view(-1, 1)
    return built


@given(n=st.integers(1, 12), seed=seeds)
def test_what_is_stored_is_drawn_again_and_other_slots_stay(n: int, seed: int) -> None:
    stored = buffer(capacity=12, restart=0)
    before = stored.states.clone()
    x, slots = stored.draw(n, gen(seed))
    assert torch.equal(x, before[slots])
    stored.store(slots, x + 100)
    assert torch.equal(stored.states[slots], x + 100)
    others = torch.ones(12, dtype=torch.bool)
    others[slots] = False
    assert torch.equal(stored.states[others], before[others])
    assert stored.states.shape == before.shape


@given(seed=seeds)
def test_a_draw_is_a_copy_so_a_chain_does_not_write_into_the_buffer(seed: int) -> None:
    stored = buffer(capacity=12, restart=0)
    before = stored.states.clone()
    stored.draw(5, gen(seed))[0].zero_()
    assert torch.equal(stored.states, before)


@given(n=st.integers(1, 12), seed=seeds)
def test_slots_are_drawn_without_replacement(n: int, seed: int) -> None:
    slots = buffer(capacity=12).slots(n, gen(seed), None)
    assert len(slots.unique()) == n


@given(seed=seeds, k=st.sampled_from([3, 100]))
def test_slots_of_classes_are_drawn_from_their_slices_without_replacement(
    seed: int, k: int
) -> None:
    stored = buffer(k, capacity=4 * k, conditional=True)
    y = torch.cat([torch.arange(k), torch.arange(k), torch.arange(3), torch.arange(3)])
    slots = stored.slots(len(y), gen(seed), y)
    assert torch.equal(slots // 4, y)
    assert len(slots.unique()) == len(y)


def test_a_class_that_wants_more_slots_than_it_has_shares_them() -> None:
    stored = buffer(capacity=6, conditional=True)
    y = torch.zeros(5, dtype=torch.int64)
    x, slots = stored.draw(5, gen(), y)
    assert set(slots.tolist()) == {0, 1}
    stored.store(slots, x)
    assert stored.states.shape == (6, 1)


def test_every_slot_is_drawn_in_the_long_run() -> None:
    stored, rng = buffer(capacity=12), gen()
    recorded = torch.zeros(12)
    for _ in range(300):
        recorded[stored.slots(4, rng, None)] += 1
    # 100 expected a slot, with a deviation of about 8
    assert (recorded - 100).abs().max() < 40


@given(share=st.sampled_from([0.0, 0.05, 0.3, 1.0]), n=st.integers(1, 12), draws=st.integers(1, 60))
def test_the_share_of_restarts_is_exact_over_many_draws(share: float, n: int, draws: int) -> None:
    stored, rng = buffer(value=-1.0, capacity=12, restart=share), gen()
    fresh = sum(int((stored.draw(n, rng)[0] == -1).sum()) for _ in range(draws))
    assert abs(fresh - share * n * draws) < 1
    if share in (0.0, 1.0):
        assert fresh == share * n * draws


def test_a_restart_begins_in_the_class_of_its_row() -> None:
    start = Marked(-1.0)
    stored = ReplayBuffer(Buffer(capacity=6, restart=1, conditional=True), start, 3, gen())
    y = torch.tensor([2, 0, 1])
    x, _ = stored.draw(3, gen(), y)
    assert (x == -1).all()
    assert torch.equal(start.classes[-1], y)


def test_a_class_conditional_buffer_begins_with_each_class_in_its_slice() -> None:
    start = Marked(0.0)
    ReplayBuffer(Buffer(capacity=6, conditional=True), start, 3, gen())
    assert start.classes[0].tolist() == [0, 0, 1, 1, 2, 2]


@given(k=st.sampled_from([3, 7, 100]), capacity=st.integers(1, 400))
def test_a_class_conditional_buffer_that_classes_do_not_divide_is_refused(
    k: int, capacity: int
) -> None:
    options, start = Buffer(capacity=capacity, conditional=True), Marked(0.0)
    if capacity % k == 0:
        assert len(ReplayBuffer(options, start, k, gen()).states) == capacity
        return
    with pytest.raises(ConfigError, match=f"multiple of {k}"):
        ReplayBuffer(options, start, k, gen())


def test_chains_of_classes_need_a_class_conditional_buffer() -> None:
    with pytest.raises(MisfitError, match=r"conditional = true"):
        buffer(capacity=6).draw(2, gen(), torch.tensor([0, 1]))


def test_more_chains_than_slots_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"raise buffer\.capacity"):
        buffer(capacity=6).draw(7, gen())


@given(n=st.integers(1, 6), seed=seeds, draws=st.integers(1, 4))
def test_a_rollback_restores_the_buffer_bit_for_bit(n: int, seed: int, draws: int) -> None:
    backbone = toy_backbone(TASK, seed=1)
    density = backbone.density
    density.draw(backbone.model, 5, gen(seed))
    before = {"states": density.buffer.states.clone(), "drawn": density.buffer.chains_begun}
    density.mark()
    for _ in range(draws):
        density.draw(backbone.model, n, gen(seed))
    assert not same(density.state_dict(), before)
    density.rollback()
    assert same(density.state_dict(), before)


def test_a_saved_buffer_of_another_shape_is_refused() -> None:
    small, large = toy_backbone(TASK).density, toy_backbone(TASK, buffer=Buffer(capacity=7)).density
    with pytest.raises(MisfitError, match=r"\[12, 1, 8, 8\] does not fit one of \[7, 1, 8, 8\]"):
        large.load_state_dict(small.state_dict())


@given(seed=seeds, n=st.integers(1, 5), m=st.integers(1, 5))
def test_the_loss_is_the_difference_of_mean_energies(seed: int, n: int, m: int) -> None:
    pos, neg = normal(seed, n), normal(seed + 1, m)
    loss = toy_backbone(TASK).density.loss
    torch.testing.assert_close(loss(pos, neg), pos.mean() - neg.mean())
    torch.testing.assert_close(loss(neg, pos), -loss(pos, neg))


@given(seed=seeds, c=st.floats(-20, 20))
def test_the_loss_ignores_a_constant_added_to_every_energy(seed: int, c: float) -> None:
    pos, neg = normal(seed, 4), normal(seed + 1, 3)
    loss = toy_backbone(TASK, density=Contrastive(penalty=0)).density.loss
    torch.testing.assert_close(loss(pos + c, neg + c), loss(pos, neg), rtol=0, atol=1e-4)


@given(seed=seeds, penalty=weights)
def test_a_penalty_is_on_the_size_that_its_option_names(seed: int, penalty: float) -> None:
    pos, neg = normal(seed, 4), normal(seed + 1, 3)
    gap = pos.mean() - neg.mean()
    means = toy_backbone(TASK, density=Contrastive(penalty=penalty)).density
    expected = gap + penalty * (pos.mean() ** 2 + neg.mean() ** 2)  # SADA-JEM
    torch.testing.assert_close(means.loss(pos, neg), expected)
    spec = Contrastive(penalty=penalty, penalty_on="positives")
    positives = toy_backbone(TASK, density=spec).density
    expected = gap + penalty * ((pos**2).mean() + neg.mean() ** 2)  # M-EBM
    torch.testing.assert_close(positives.loss(pos, neg), expected)


@given(seed=seeds)
def test_a_small_step_on_the_loss_lowers_the_gap_between_data_and_negatives(seed: int) -> None:
    model = linear_model(64, 3, seed)
    density = toy_backbone(TASK).density
    x, x_neg = normal(seed, 4, 1, 8, 8), normal(seed + 1, 4, 1, 8, 8)

    def gap() -> Tensor:
        return density.loss(model(x).energy, model(x_neg).energy)

    before = gap()
    torch.autograd.backward(before)
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * p.grad
    assert gap() < before


@pytest.mark.parametrize("name", [b for b in BACKBONES if b != "classifier"])
def test_a_draw_leaves_the_model_alone(name: str) -> None:
    backbone = backbone_of(name)
    first = next(backbone.model.parameters())
    first.grad = torch.ones_like(first)
    before, own = state_of(backbone.model), torch.get_rng_state()
    x = backbone.density.draw(backbone.model, 5, gen())
    assert same(state_of(backbone.model), before)
    assert torch.equal(torch.get_rng_state(), own)
    assert not x.requires_grad
    assert x.isfinite().all()


@pytest.mark.parametrize("mode", ["batch_stats", "running_stats"])
def test_running_statistics_stay_bit_for_bit_through_chains(mode: str) -> None:
    backbone = toy_backbone(TASK, density=Contrastive(batch_norm=mode))
    backbone.model.train()
    before = [m.running_mean.clone() for m in batch_norms(backbone.model)]
    backbone.density.draw(backbone.model, 5, gen())
    after = [m.running_mean for m in batch_norms(backbone.model)]
    assert before
    assert all(map(torch.equal, before, after))


def test_the_released_batch_norm_moves_running_statistics_while_sampling() -> None:
    backbone = toy_backbone(TASK, density=Contrastive(batch_norm="released"))
    before = batch_norms(backbone.model)[0].running_mean.clone()
    backbone.density.draw(backbone.model, 5, gen())
    assert not torch.equal(batch_norms(backbone.model)[0].running_mean, before)


@pytest.mark.parametrize("mode", ["batch_stats", "running_stats", "released"])
def test_samples_leave_running_statistics_as_they_are(mode: str) -> None:
    backbone = toy_backbone(TASK, density=Contrastive(batch_norm=mode))
    backbone.model.eval()
    before = state_of(backbone.model)["tensors"]
    density = backbone.density
    density.sample(backbone.model, 5, gen(), steps=2, start=density.start)
    assert same(before, state_of(backbone.model)["tensors"])


@given(seed=seeds)
def test_a_boxed_chain_ends_in_the_range_and_an_unboxed_one_may_leave_it(seed: int) -> None:
    wild = SGLD(step_size=0, noise=3.0)
    boxed = toy_backbone(TASK, sampler=wild)
    x = boxed.density.draw(boxed.model, 5, gen(seed))
    assert x.abs().max() <= 1
    free = toy_backbone(TASK, density=Contrastive(box=False), sampler=wild)
    assert free.density.draw(free.model, 5, gen(seed)).abs().max() > 1


def test_fresh_samples_never_touch_the_buffer() -> None:
    backbone = toy_backbone(TASK)
    before = backbone.density.buffer.states.clone()
    start = Uniform().build(TASK, torch.device("cpu"))
    x = backbone.density.sample(backbone.model, 4, gen(), steps=3, start=start)
    again = backbone.density.sample(backbone.model, 4, gen(), steps=3, start=start)
    assert torch.equal(x, again)
    assert torch.equal(backbone.density.buffer.states, before)


def test_conditional_chains_descend_the_joint_energy_of_their_class() -> None:
    backbone = toy_backbone(
        TASK,
        linear_model(64, 3),
        sampler=SGLD(step_size=0.05, noise=0),
        buffer=Buffer(capacity=12, conditional=True, restart=0),
        steps=20,
    )
    y = torch.tensor([0, 1, 2, 2])
    begin = backbone.density.buffer.states[backbone.density.buffer.slots(4, gen(), y)]
    x = backbone.density.draw(backbone.model, 4, gen(), y)
    assert (backbone.model(x).joint(y) < backbone.model(begin).joint(y)).all()
    assert torch.equal(backbone.model(x).logits.argmax(1), y)


def test_the_first_draw_begins_where_the_start_draws() -> None:
    backbone = toy_backbone(TASK, steps=0, buffer=Buffer(capacity=12, restart=0))
    states = backbone.density.buffer.states.clone()
    rng = gen(0)
    expected = UniformStart(TASK.shape, Bounds()).draw(12, rng, None)
    assert torch.equal(states, expected)
    x = backbone.density.draw(backbone.model, 12, gen())
    assert torch.equal(x.flatten(1).sum(1).sort().values, states.flatten(1).sum(1).sort().values)


def test_data_is_a_batch_of_the_task() -> None:
    batch = toy_batch(TASK, 6, positives=4)
    assert (len(batch.x), len(batch.x_pos)) == (6, 4)


@pytest.mark.parametrize("capacity", [10**13, 2**63 - 1])
@pytest.mark.parametrize("fill", [False, True])
def test_a_buffer_that_no_memory_could_hold_is_refused_with_what_it_takes(
    capacity: int, fill: bool
) -> None:
    recipe = toy_recipe(toy_registry(), "mebm", "ebjdat", "plain", f"{CAPACITY}={capacity}").recipe
    with pytest.raises(ConfigError, match=rf"{CAPACITY} = {capacity} takes \d+\.\d GB .*1 x 8 x 8"):
        build_run(recipe, fill=fill)
