"""Processes that share a batch move as one process with the whole of it."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from groups import TASK, batch_of, part_of, squared
from hypothesis import given
from hypothesis import strategies as st
from ranks import every_rank
from strategies import normal, seeds
from torch import Tensor, nn
from torch.optim import SGD
from toys import backbone_of, gen, objective_of, updater_of

from jemkit import ConfigError, Diverged, Guard, JemkitError, MisfitError, Plain, Preempted, Terms
from jemkit.data import Augmentation, Bounds, Loader, Views
from jemkit.errors import OutOfMemory
from jemkit.models.networks import SmallCNN
from jemkit.models.norms import SyncBatchNorm
from jemkit.runtime import distributed
from jemkit.runtime.divergence_monitor import Unhealthy
from jemkit.runtime.modes import frozen_batch_stats, sampling_mode
from jemkit.runtime.pytree import same
from jemkit.runtime.work_cache import WHOLE, Shard
from jemkit.training.reshard import reshard_state

UPDATERS = ("plain", "sam", "awp")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ebjdat": {"w1": 0.5, "w2": 0.5},
    "ebjdat, squared": {"w1": 0.5, "w2": 0.05, "outer": "squared"},
    "ebjdatreleased": {},
    "jem": {},
}
UPDATES = 6


def updated(updater: str, objective: str, me: Shard) -> dict[str, Tensor]:
    """The weights after updates on draws that are the same however many processes share them."""
    backbone = squared(backbone_of("sadajem", network=SmallCNN(channels=2, norm="none")))
    other = squared(backbone_of("sadajem", network=SmallCNN(channels=2, norm="none")))
    method, rng = objective_of(objective.split(",")[0], **OBJECTIVES[objective]), gen(1)
    moved, guard = updater_of(updater, backbone.model, lr=0.1), Guard()
    for step in range(UPDATES):
        batch = batch_of(step)
        draws = method.draw(other, batch, rng)  # of weights that never move: the same everywhere
        own, drawn = part_of(batch, me), part_of(draws, me)
        moved.step(lambda own=own, drawn=drawn: method.loss(backbone, own, drawn), guard)
    return {name: p.detach() for name, p in backbone.model.named_parameters()}


def all_updated() -> dict[str, dict[str, Tensor]]:
    with distributed.together():
        return {
            f"{u} {o}": updated(u, o, distributed.shard())
            for u, o in itertools.product(UPDATERS, OBJECTIVES)
        }


@pytest.fixture(scope="module")
def both() -> list[dict[str, dict[str, Tensor]]]:
    return every_rank(all_updated)


@pytest.mark.parametrize("updater", UPDATERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_with_half_a_batch_each_move_as_one_with_the_whole(
    both: list[dict[str, dict[str, Tensor]]], updater: str, objective: str
) -> None:
    """Squared batch means and all; to 1e-5, since sums are taken in another order."""
    alone = updated(updater, objective, WHOLE)
    begun = backbone_of("sadajem", network=SmallCNN(channels=2, norm="none")).model
    first, second = (states[f"{updater} {objective}"] for states in both)
    for name, _ in begun.named_parameters():
        assert torch.equal(first[name], second[name]), name  # the processes never drift apart
        torch.testing.assert_close(first[name], alone[name], rtol=0, atol=1e-5)
    assert max((alone[n] - p).abs().max() for n, p in begun.named_parameters()) > 0.01


@given(size=st.sampled_from([1, 2, 4]), seed=seeds, share=st.sampled_from([1.0, 0.5]))
def test_the_processes_batches_together_are_one_processs_batch(
    size: int, seed: int, share: float
) -> None:
    images = TASK.images("train")
    views = Views(noise_x=0.1, pos_share=share)
    loaders = [
        Loader(
            images, 8, gen(seed), views=views, bounds=Bounds(),
            augmentation=Augmentation(pad=1, flip=True), shard=shard,
        )
        for shard in (WHOLE, *(Shard(rank, size) for rank in range(size)))
    ]  # fmt: skip
    for _ in range(4):  # into a second epoch
        whole, *parts = (loader.batch() for loader in loaders)
        for name in ("x", "y", "x_pos", "index"):
            joined = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(joined, getattr(whole, name)), name
        for part in parts:  # x_pos is a view of the first of a process's own images
            assert len(part.x_pos) == share * len(part.x)
    assert len({loader.rng.get_state().numpy().tobytes() for loader in loaders}) == 1


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    def loader(size: int, batch: int, views: Views) -> Loader:
        return Loader(
            TASK.images("train"), batch, gen(), views=views, bounds=Bounds(),
            augmentation=Augmentation(), shard=Shard(0, size),
        )  # fmt: skip

    with pytest.raises(ConfigError, match="2 processes cannot divide 9 images per step evenly"):
        loader(2, 9, Views())
    with pytest.raises(ConfigError, match="cannot divide 2 images of the density"):
        loader(4, 8, Views(pos_share=0.25))


@given(before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2, 4]), seed=seeds)
def test_a_resharded_buffer_has_the_same_slots_in_the_same_order(
    before: int, after: int, seed: int
) -> None:
    whole = normal(seed, 8, 1, 2, 2)
    saved = [{"states": whole[rank::before], "drawn": 8} for rank in range(before)]
    density = backbone_of("jem").density
    parts = [reshard_state(saved, density, Shard(rank, after)) for rank in range(after)]
    again = torch.stack([part["states"] for part in parts], dim=1).flatten(0, 1)
    assert torch.equal(again, whole)
    assert sum(part["drawn"] for part in parts) == 8 * before


@given(before=st.sampled_from([2, 4]), after=st.sampled_from([1, 2, 4]), seed=seeds)
def test_a_density_says_itself_how_its_state_is_resharded(
    before: int, after: int, seed: int
) -> None:
    stranger: Any = SimpleNamespace(deals={"momenta": "slots", "begun": "count", "scale": "alike"})
    whole = normal(seed, 8, 3)
    saved = [{"momenta": whole[r::before], "begun": 4, "scale": 2.5} for r in range(before)]
    parts = [reshard_state(saved, stranger, Shard(rank, after)) for rank in range(after)]
    assert all(torch.equal(parts[r]["momenta"], whole[r::after]) for r in range(after))
    assert [part["begun"] for part in parts] == [4 * before // after] * after
    assert [part["scale"] for part in parts] == [2.5] * after


@pytest.mark.parametrize(
    "deals", [None, {}, {"momenta": "slots"}, {"momenta": "rows", "t": "same"}]
)
def test_a_density_that_does_not_say_how_its_state_is_resharded_is_refused(deals: Any) -> None:
    stranger: Any = SimpleNamespace(**({} if deals is None else {"deals": deals}))
    saved = [{"momenta": normal(0, 4), "t": 1}] * 2
    with pytest.raises(MisfitError, match=r"redistributed: resume with 2 process.*momenta, t"):
        reshard_state(saved, stranger, Shard(0, 1))


def test_a_state_survives_being_packed() -> None:
    state = {"a": {3: normal(0, 2), "b": [1, 2.5, None, True]}, "rng": gen().get_state()}
    assert same(distributed._unpacked(distributed._packed(state)), state)


def test_outside_of_a_group_every_function_is_the_identity() -> None:
    x = normal(0, 3).requires_grad_()
    assert distributed.average(x) is x
    assert torch.equal(distributed.mean(x), x.mean())
    assert distributed.averages([x])[0] is x
    distributed.reduce([x])
    with distributed.together(), distributed.group():
        assert distributed.size() == 1
        assert distributed.shard() == WHOLE
        assert distributed.total(3, True) == [3, 1]
        assert distributed.gather(x)[0] is distributed.on_rank_zero(lambda: x) is x


def collectives() -> dict[str, Any]:
    """What the functions give in a group; told to the parent."""
    me, host = distributed.shard(), {}
    value = torch.tensor(float(me.rank), requires_grad=True)
    host["alone"] = float(distributed.average(value))
    with distributed.together():
        host["mean"] = distributed.mean(torch.tensor([1.0, 3.0]) * (me.rank + 1)).detach()
        (slope,) = torch.autograd.grad(distributed.average(value).square() * (me.rank + 1), value)
        host["slope"] = slope
        first = torch.full((2, 3, 4, 5), float(me.rank)).to(memory_format=torch.channels_last)
        second = torch.full((3,), 2.0 * me.rank, dtype=torch.float64)
        distributed.reduce([first, second, first[:0]])
        host["reduced"] = [first, second]
        host["finite"] = agreed(me)
        weights = normal(me.rank, 3)
        distributed.broadcast([weights])
        host["weights"] = weights
    host["gathered"] = distributed.gather({"x": torch.ones(me.rank + 1)})
    host["total"] = distributed.total(me.rank + 1, me.rank == 1)
    host["broadcast"] = distributed.on_rank_zero(
        lambda: {"x": torch.arange(3), "of": [me.rank, None]}
    )
    host["inside"] = distributed.on_rank_zero(
        lambda: [distributed.shard().size, *distributed.on_rank_zero(lambda: [me.rank])]
    )
    host["raised"] = [raised(error) for error in ERRORS]
    return host


ERRORS = (
    Preempted("stopped"), OutOfMemory("no room", undone=False), Unhealthy("E(x)", 3, "ran away"),
)  # fmt: skip


def raised(error: JemkitError) -> list[Any]:
    """What a process raises where rank 0 fails."""

    def fails() -> None:
        raise error

    try:
        distributed.on_rank_zero(fails)
    except JemkitError as caught:
        more = [*getattr(caught, "finding", []), getattr(caught, "undone", None)]
        return [type(caught).__name__, str(caught), caught.reported, *more]
    return []


def agreed(me: Shard) -> list[Any]:
    """A loss that is not finite in the second process alone."""
    w = nn.Parameter(torch.ones(2))
    updater, guard = Plain().build(nn.Module(), SGD([w], lr=0.1)), Guard()
    errors: list[Any] = []

    def terms() -> Terms:
        loss = w.square().sum()
        return Terms.weighted({"h1": (1.0, loss + (float("inf") if me.rank else 0.0))})

    try:
        updater.step(terms, guard)
    except Diverged as error:
        errors.append(str(error))
    return [*errors, w.detach()]


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return every_rank(collectives)


def test_a_mean_is_that_of_all_processes_and_its_slope_that_of_all_their_losses(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        assert float(result["mean"]) == 3.0  # of 1, 3, 2, 6
        assert float(result["slope"]) == 1.5  # 2 m (1 + 2) / 2 at m = 0.5
    assert [result["alone"] for result in results] == [0.0, 1.0]


def test_gradients_are_averaged_whatever_their_type_and_layout(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        first, second = result["reduced"]
        assert torch.equal(first, torch.full((2, 3, 4, 5), 0.5))
        assert torch.equal(second, torch.ones(3, dtype=torch.float64))


def test_a_loss_that_is_sick_in_one_process_stops_the_update_in_all(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        message, w = result["finite"]
        assert "h1 = inf" in message
        assert torch.equal(w, torch.ones(2))


def test_rank_0_broadcasts_values_and_errors_and_gathers_all_trees(
    results: list[dict[str, Any]],
) -> None:
    first, second = results
    assert torch.equal(first["weights"], second["weights"])
    assert [len(g["x"]) for g in first["gathered"]] == [1, 2]
    assert second["gathered"] == []
    for rank, result in enumerate(results):
        assert result["total"] == [3, 1]
        assert same(result["broadcast"], {"x": torch.arange(3), "of": [0, None]})
        assert result["inside"] == [1, 0]  # rank 0 is alone there
        assert result["raised"] == [
            ["Preempted", "stopped", rank == 1, None],
            ["OutOfMemory", "no room", rank == 1, False],
            ["Unhealthy", "ran away", rank == 1, "E(x)", 3, "ran away", None],
        ]


def normed(norm: nn.BatchNorm2d, x: Tensor) -> dict[str, Tensor]:
    """A pass, a chain's pass and their gradients; x far from what was seen before."""
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.0, 3.0]))
    x = x.clone().requires_grad_()
    y = norm(x)
    y.sin().sum().backward()  # slopes of the size of one
    results = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    with frozen_batch_stats(norm):
        norm(2 * x)
    with sampling_mode(norm, "running_stats"):
        results["running"] = norm(x).detach()
    return {**results, **{name: b.float() for name, b in norm.named_buffers()}}


def synced() -> dict[str, Tensor]:
    me = distributed.shard()
    with distributed.together():
        return normed(SyncBatchNorm(3, momentum=0.3), images_of_norm()[me.rank :: me.size])


def images_of_norm() -> Tensor:
    return 4 + normal(5, 6, 3, 4, 4) * torch.tensor([1.0, 3.0, 0.2])[:, None, None]


def test_synchronised_batch_norm_is_one_processs_batch_norm_on_the_whole_batch() -> None:
    """Forward, backward and running statistics; the weights' slopes add up."""
    whole, parts = normed(nn.BatchNorm2d(3, momentum=0.3), images_of_norm()), every_rank(synced)
    close = {"rtol": 1e-5, "atol": 1e-5}
    for name in ("y", "x", "running"):
        joined = torch.stack([part[name] for part in parts], dim=1).flatten(0, 1)
        torch.testing.assert_close(joined, whole[name], **close)
    for name in ("weight", "bias"):
        torch.testing.assert_close(
            sum(part[name] for part in parts), whole[name], rtol=1e-4, atol=1e-4
        )
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for part in parts:
            torch.testing.assert_close(part[name], whole[name], **close)


@given(seed=seeds)
def test_in_one_process_synchronised_batch_norm_is_batch_norm_bit_for_bit(seed: int) -> None:
    x = normal(seed, 4, 3, 2, 2)
    ours, theirs = normed(SyncBatchNorm(3), x), normed(nn.BatchNorm2d(3), x)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert list(SyncBatchNorm(3).state_dict()) == list(nn.BatchNorm2d(3).state_dict())
