"""Processes that share the weights out move, save and go on as those that each hold all of them."""

import itertools
from typing import Any

import pytest
import torch
from groups import batch_of, part_of, squared
from hypothesis import given
from ranks import every_rank
from strategies import normal, seeds
from torch import Tensor, nn
from toys import backbone_of, gen, objective_of, updater_of

from jemkit import ConfigError, Guard, MisfitError, Terms
from jemkit.models.networks import WRN, SmallCNN
from jemkit.runtime import distributed, fsdp
from jemkit.runtime.microbatch import MicroBatch
from jemkit.runtime.pytree import same
from jemkit.testing import toy_task
from jemkit.training.build import shardable
from jemkit.updaters import EMA, PlainUpdater, backward, total_norm

TASK = toy_task()
X = torch.zeros((1, *TASK.shape))
SHARD = "run.shard=true"
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sam": {},
    "asam": {"adaptive": True, "rho": 0.5},
    "awp": {},
}
NETWORKS = {
    "norm-free": SmallCNN(channels=3, norm="none"),  # shares of 2 and 1 rows
    "batch norm": SmallCNN(channels=3, norm="batch"),
    "blocks": WRN(depth=10, width=1, norm="group"),
    "blocks with batch norm": WRN(depth=10, width=1),
}
BLOCKS = [("sam", "blocks"), ("sam", "blocks with batch norm")]
MATRIX = [*itertools.product(CASES, ("norm-free", "batch norm")), *BLOCKS]
QUICK = [*zip(CASES, ("norm-free", "batch norm") * 2, strict=True), *BLOCKS]
UPDATES = 2


def updated(case: str, network: str, *, shard: bool, **memory: Any) -> dict[str, Tensor]:
    """Whole weights, momenta and their average after updates whose chains pass through them."""
    backbone = squared(backbone_of("sadajem", network=NETWORKS[network]))
    if shard:
        fsdp.shard(backbone.model, X)
    name = "sam" if case == "asam" else case
    moved = updater_of(name, backbone.model, lr=0.1, **CASES[case])
    average, objective = EMA(backbone.model, 0.5), objective_of("ebjdat", w1=0.5, w2=0.5)
    rng, guard, norms = gen(distributed.shard().rank), Guard(), []
    for step in range(UPDATES):
        batch = part_of(batch_of(step), distributed.shard())
        with MicroBatch(**memory).active():
            draws = objective.draw(backbone, batch, rng)
            moved.step(lambda b=batch, d=draws: objective.loss(backbone, b, d), guard)
        average.update(backbone.model)
        assert guard.verdict is not None
        norms.append(guard.verdict.grad_norm)
    weights = {f"ema {name}": t for name, t in average.average.items()}
    weights |= {name: p.detach() for name, p in backbone.model.named_parameters()}
    weights |= {
        f"momentum {name}": moved.optimizer.state[p]["momentum_buffer"]
        for name, p in backbone.model.named_parameters()
    }
    return {**fsdp.whole(weights), "norms": torch.stack(norms)}


def all_updated(cases: list[tuple[str, str]]) -> dict[str, dict[str, Tensor]]:
    with distributed.together():
        return {
            f"{case} {network} {shard}": updated(case, network, shard=shard)
            for case, network in cases
            for shard in (False, True)
        }


def results() -> dict[str, Any]:
    """Of everything that needs no folder, in one group."""
    moved = all_updated(QUICK)
    with distributed.together():
        moved["sliced"] = updated("sam", "blocks", shard=True, size=2)
        moved["recomputed"] = updated("sam", "blocks with batch norm", shard=True, recompute=True)
        beside = [beside_others(shard=shard) for shard in (False, True)]
    scattered = {rows: scattered_and_gathered(rows) for rows in (3, 1)}
    return {
        "updated": moved, "memory": memory_in_use(), "scattered": scattered, "norm": norm_of_sick(),
        "beside": beside, "stateful": stateful(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def both() -> list[dict[str, Any]]:
    return every_rank(results)


@pytest.mark.parametrize(("case", "network"), QUICK)
def test_processes_with_sharded_weights_train_as_those_with_whole_weights(
    both: list[dict[str, Any]], case: str, network: str
) -> None:
    """Weights, gradient norms, momenta and EMA agree to 1e-5: sums are taken in another order."""
    check_sharded([rank["updated"] for rank in both], case, network)


@pytest.mark.slow
def test_every_updater_trains_sharded_weights_with_every_norm_as_whole_weights() -> None:
    results = every_rank(all_updated, MATRIX)
    for case, network in MATRIX:
        check_sharded(results, case, network)


def check_sharded(ranks: list[dict[str, dict[str, Tensor]]], case: str, network: str) -> None:
    begun = backbone_of("sadajem", network=NETWORKS[network]).model
    first, second = ranks
    whole, shared = (first[f"{case} {network} {shard}"] for shard in (False, True))
    for name in whole:
        if "running" not in name:  # each process's own until a step's end
            torch.testing.assert_close(shared[name], whole[name], rtol=1e-5, atol=1e-5)
            assert torch.equal(shared[name], second[f"{case} {network} True"][name])
    assert max((whole[n] - p).abs().max() for n, p in begun.named_parameters()) > 0.01


def test_shares_are_gathered_for_every_slice_of_a_micro_batch(both: list[dict[str, Any]]) -> None:
    updates = both[0]["updated"]
    for name, whole in updates["sam blocks False"].items():
        torch.testing.assert_close(updates["sliced"][name], whole, rtol=1e-5, atol=1e-5)


def test_sharded_weights_are_gathered_where_activations_are_recomputed(
    both: list[dict[str, Any]],
) -> None:
    updates = both[0]["updated"]
    for name, whole in updates["sam blocks with batch norm True"].items():
        assert torch.equal(updates["recomputed"][name], whole)


def memory_in_use() -> dict[str, Any]:
    """Bytes of one process, before and after; and what an update leaves there."""
    backbone = backbone_of("sadajem", network=WRN(depth=10, width=2, norm="none"))
    model = backbone.model
    before = sum(p.numel() for p in model.parameters())
    fsdp.shard(model, X)
    moved = updater_of("sam", model)
    batch, objective = part_of(batch_of(0), distributed.shard()), objective_of("ce")
    with distributed.together():
        moved.step(lambda: objective.loss(backbone, batch, None), Guard())
    backward(moved.optimizer, lambda: objective.loss(backbone, batch, None))
    params = list(model.parameters())
    grads = [p.grad for p in params if p.grad is not None]
    momenta = [state["momentum_buffer"] for state in moved.optimizer.state.values()]
    sizes = [sum(fsdp.local(t).numel() for t in ts) for ts in (params, grads, momenta)]
    with torch.no_grad():
        model(batch.x)  # what it gathers it lets go
    sizes.append(sum(fsdp.local(p).numel() for p in model.parameters()))
    names = [type(unit).__name__ for unit in fsdp.units(model)]
    return {"before": before, "sizes": sizes, "units": names}


def test_each_process_holds_its_part_of_weights_gradients_and_momenta(
    both: list[dict[str, Any]],
) -> None:
    first, second = (rank["memory"] for rank in both)
    for one, other in zip(first["sizes"], second["sizes"], strict=True):
        assert one + other == first["before"]
        assert abs(one - other) < 0.02 * first["before"]
    assert [name.removeprefix("FSDP") for name in first["units"]] == [
        "Conv2d", "WideBlock", "WideBlock", "WideBlock", "Linear",
    ]  # fmt: skip


def beside_others(*, shard: bool) -> dict[str, Tensor]:
    """Weights of an objective's own, which nobody shares, in the same optimizer."""
    model, own = nn.Linear(2, 3), nn.Linear(3, 1)
    with torch.no_grad():
        for p in (*model.parameters(), *own.parameters()):
            p.copy_(torch.randn(p.shape, generator=gen(p.numel())))
    if shard:
        fsdp.shard(model, torch.zeros(1, 2))
    optimizer = torch.optim.SGD([*model.parameters(), *own.parameters()], lr=0.1, momentum=0.9)
    x, guard = normal(distributed.shard().rank, 4, 2), Guard()
    for _ in range(2):
        terms = backward(
            optimizer, lambda: Terms.weighted({"f": (1.0, own(model(x)).exp().mean())})
        )
        guard.update(optimizer, terms)
    assert guard.verdict is not None
    weights = {**dict(model.named_parameters()), "own": own.weight.detach()}
    return {**fsdp.whole(weights), "norm": guard.verdict.grad_norm}


def test_an_objectives_own_weights_move_beside_those_in_shares(both: list[dict[str, Any]]) -> None:
    for rank in both:
        whole, shared = rank["beside"]
        for name, t in whole.items():
            torch.testing.assert_close(shared[name], t, rtol=1e-5, atol=1e-6)


class Keeping(PlainUpdater):
    """Remembers something."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def stateful() -> str:
    model: Any = nn.Linear(2, 3)
    updater = Keeping(torch.optim.SGD(model.parameters()))
    assert shardable(updater, model) is updater
    fsdp.shard(model, torch.zeros(1, 2))
    try:
        return type(shardable(updater, model)).__name__
    except MisfitError as error:
        return str(error)


def test_an_updater_whose_state_nobody_can_deal_out_is_refused(both: list[dict[str, Any]]) -> None:
    for rank in both:
        assert "the updater Keeping keeps a state of its own" in rank["stateful"]


def test_the_units_of_any_module_hold_every_weight_once() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.inner = nn.Sequential(
                nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
                nn.ModuleDict({"a": nn.BatchNorm1d(2)}),
            )

    odd = Odd()
    units = list(fsdp.units(odd))
    assert [type(unit).__name__ for unit in units] == ["Linear", "BatchNorm1d", "Odd"]
    inner = [p for unit in units[:-1] for p in unit.parameters()]
    assert {*map(id, inner), id(odd.scale)} == {id(p) for p in odd.parameters()}


@given(seed=seeds)
def test_whole_tensors_are_left_as_they_are(seed: int) -> None:
    x = normal(seed, 3)
    assert fsdp.local(x) is fsdp.like(x, x) is fsdp.whole([x])[0] is x
    into = torch.zeros(3)
    fsdp.fill(into, x)
    assert torch.equal(into, x)
    assert torch.equal(total_norm([x], x), x.norm().float())


def scattered_and_gathered(rows: int) -> list[Any]:
    layer = nn.Linear(2, rows)
    full = {name: torch.randn(p.shape, generator=gen()) for name, p in layer.named_parameters()}
    fsdp.shard(layer, torch.zeros(1, 2))
    for name, p in layer.named_parameters():
        fsdp.fill(p, full[name])
    gathered = fsdp.whole(layer.state_dict(), keep=distributed.shard().rank == 0)
    return [gathered, full, fsdp.local(layer.weight).detach()]


def test_scattered_parts_are_gathered_bit_for_bit(
    both: list[dict[str, Any]],
) -> None:
    """Of three rows one process has two; of one row it has all."""
    for rows in (3, 1):
        (gathered, full, part), (nothing, _, other) = (rank["scattered"][rows] for rank in both)
        assert same(gathered, full)
        assert set(nothing.values()) == {None}
        assert torch.equal(torch.cat([part, other]), full["weight"])


def norm_of_sick() -> str:
    """A gradient that is NaN in the second process's part alone."""
    layer = nn.Linear(2, 4, bias=False)
    fsdp.shard(layer, torch.zeros(1, 2))
    full = torch.ones(4, 2)
    full[3] = float("nan")
    grad = fsdp.like(full, layer.weight)
    return str(float(total_norm([grad], grad)))


def test_a_norm_is_sick_everywhere_where_one_part_is(both: list[dict[str, Any]]) -> None:
    assert [rank["norm"] for rank in both] == ["nan", "nan"]


def test_weights_that_no_layer_gathers_are_refused() -> None:
    model = backbone_of("sadajem").model
    fsdp.check(model, model.network, by_stem=True)
    model.network.scale = nn.Parameter(torch.ones(1))
    fsdp.check(model, model.network, by_stem=False)
    with pytest.raises(ConfigError, match=r"has the weight scale, .* choose another sampler"):
        fsdp.check(model, model.network, by_stem=True)
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(ConfigError, match=r"1\.weight is the weight of two layers"):
        fsdp.check(tied, tied, by_stem=False)
