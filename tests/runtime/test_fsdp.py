"""Processes that share the weights out move, save and go on as those that each hold all of them."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from groups import DIGITS, batch_of, different, end_of, part_of, recipe, run, squared
from hypothesis import given
from ranks import every_rank, torchrun
from safetensors.torch import save_file
from strategies import normal, seeds
from torch import Tensor, nn
from toys import backbone_of, gen, objective_of, toy_registry, updater_of

from jemkit import ConfigError, Diverged, Guard, MisfitError, Terms, train
from jemkit.models.networks import WRN, SmallCNN
from jemkit.runtime import distributed, fsdp
from jemkit.runtime.checkpoint import load
from jemkit.runtime.microbatch import MicroBatch
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.testing import toy_task
from jemkit.training.build import shardable
from jemkit.training.trainer import Trainer
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
UPDATES = 4


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


def results() -> dict[str, Any]:
    """Of everything that needs no folder, in one group."""
    with distributed.together():
        moved = {
            f"{case} {network} {shard}": updated(case, network, shard=shard)
            for case, network in MATRIX
            for shard in (False, True)
        }
        moved["sliced"] = updated("sam", "blocks", shard=True, size=2)
        moved["anew"] = updated("sam", "blocks with batch norm", shard=True, recompute=True)
        beside = [beside_others(shard=shard) for shard in (False, True)]
    scattered = {rows: scattered_and_gathered(rows) for rows in (3, 1)}
    return {
        "updated": moved, "held": memory_in_use(), "dealt": scattered, "norm": norm_of_sick(),
        "beside": beside, "stateful": stateful(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def both() -> list[dict[str, Any]]:
    return every_rank(results)


@pytest.mark.parametrize(("case", "network"), MATRIX)
def test_processes_that_share_the_weights_move_as_those_that_hold_all_of_them(
    both: list[dict[str, Any]], case: str, network: str
) -> None:
    """Chains, gradients' norms, momenta and averages and all; to 1e-5, for the order of sums."""
    begun = backbone_of("sadajem", network=NETWORKS[network]).model
    first, second = (rank["updated"] for rank in both)
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
        assert torch.equal(updates["anew"][name], whole)


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
    first, second = (rank["held"] for rank in both)
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
        (gathered, full, part), (nothing, _, other) = (rank["dealt"][rows] for rank in both)
        assert same(gathered, full)
        assert set(nothing.values()) == {None}
        assert torch.equal(torch.cat([part, other]), full["weight"])


def whole_runs(name: str) -> dict[str, Any]:
    """Two equal runs, one that is stopped and gone on with, and each way across."""
    folder = Path(name)
    common = ("run.channels_last=no", "run.ema_decay=0.5")
    for out in ("a", "b"):
        run(str(folder / out), overrides=(*common, SHARD))
    run(str(folder / "whole"), overrides=common)
    run(str(folder / "cut"), until=5, overrides=(*common, SHARD))
    run(str(folder / "uncut"), until=5, overrides=common)
    if distributed.shard().rank == 0:
        shutil.copytree(folder / "cut", folder / "shared-then-one")
        shutil.copytree(folder / "cut", folder / "shared-then-whole")
    run(str(folder / "cut"), resume=True, overrides=(*common, SHARD))
    run(str(folder / "shared-then-whole"), resume=True, overrides=common)
    run(str(folder / "uncut"), resume=True, overrides=(*common, SHARD))
    run(str(folder / "pyld"), overrides=(SHARD, "backbone.sampler.use=pyld"))
    run(str(folder / "bf16"), overrides=(SHARD, "run.precision=bf16", "optimizer.use=adam"))
    start = folder / "start.safetensors"
    train(recipe(SHARD), folder / "begun", registry=toy_registry(), init_from=start)
    return {"refused": refused(folder), "ended": diverging(folder)}


def refused(folder: Path) -> list[str]:
    errors = []
    for option in ("run.compile=true", "run.channels_last=yes"):
        try:
            run(str(folder / "refused"), overrides=(SHARD, option))
        except ConfigError as error:
            errors.append(str(error))
    return errors


def diverging(folder: Path) -> str:
    try:
        run(str(folder / "diverged"), overrides=(SHARD, "optimizer.lr=1e9", "updater.rho=0"))
    except Diverged:
        return "Diverged"
    return "ended"


class Runs(NamedTuple):
    """Where they are, and what each process told."""

    folder: Path
    results: list[dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = tmp_path_factory.mktemp("runs")
    save_file(dict(started().state_dict()), made / "start.safetensors")
    return Runs(made, every_rank(whole_runs, str(made)))


@pytest.fixture
def folder(runs: Runs) -> Path:
    return runs.folder


def started() -> nn.Module:
    """The model of another seed."""
    return Trainer(recipe("run.seed=9", "run.channels_last=no"), RunFolder(Path())).backbone.model


def test_a_shared_run_repeats_bit_for_bit_and_goes_on_so_after_a_stop(folder: Path) -> None:
    assert different(folder / "a", folder / "b") == []
    assert different(folder / "a", folder / "cut") == []


@pytest.mark.parametrize("other", ["a", "uncut", "shared-then-whole"])
def test_a_shared_run_is_the_run_of_processes_that_hold_all_weights(
    folder: Path, other: str
) -> None:
    """Also where either goes on with what the other saved; and its checkpoints look the same."""
    one, two = end_of(folder / "whole"), end_of(folder / other)
    assert same(shapes(one), shapes(two))
    for kind in ("model", "ema"):
        for name, t in one[kind].items():
            torch.testing.assert_close(two[kind][name], t, rtol=1e-5, atol=1e-5)
    momenta = [state["optimizer"]["state"][3]["momentum_buffer"] for state in (one, two)]
    torch.testing.assert_close(*momenta, rtol=1e-5, atol=1e-5)
    accuracy = [[entry["accuracy"] for entry in state["history"]] for state in (one, two)]
    assert accuracy[0] == accuracy[1]
    assert (folder / other / "samples" / "epoch-0002.png").exists()


def shapes(state: Any) -> Any:
    """A state's names and shapes."""
    if isinstance(state, dict):
        return {k: shapes(v) for k, v in state.items() if k not in ("seconds", "history", "care")}
    return list(state.shape) if isinstance(state, Tensor) else 0


def test_one_process_takes_a_shared_checkpoint_up_as_it_was_saved(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at = folder / "shared-then-one"
    saved = load(at / "checkpoints" / "step-00000005")
    trainer = Trainer(recipe(SHARD, "run.ema_decay=0.5"), RunFolder(at))
    trainer.load_state_dict(saved)
    state = trainer.state_dict()
    for kind in ("model", "ema", "optimizer"):
        assert same(state[kind], saved[kind])
    run(str(at), resume=True, overrides=(SHARD, "run.channels_last=no", "run.ema_decay=0.5"))
    assert "run.shard shards nothing in one process" in caplog.text
    assert all(t.isfinite().all() for t in end_of(at)["model"].values())


@pytest.mark.parametrize("name", ["pyld", "bf16"])
def test_samplers_that_enter_by_a_part_and_bfloat16_train_to_the_end(
    folder: Path, name: str
) -> None:
    state = end_of(folder / name)
    assert all(t.isfinite().all() for t in state["model"].values())
    momenta = state["optimizer"]["state"][0]
    wanted = {"exp_avg", "exp_avg_sq", "step"} if name == "bf16" else {"momentum_buffer"}
    assert set(momenta) == wanted


def test_a_shared_run_begins_with_the_weights_that_it_is_given(folder: Path) -> None:
    first = load(folder / "begun" / "checkpoints" / "step-00000000")
    assert same(first["model"], dict(started().state_dict()))
    assert not same(end_of(folder / "begun")["model"], first["model"])


def test_a_shared_run_that_diverges_ends_in_every_process(runs: Runs) -> None:
    assert [rank["ended"] for rank in runs.results] == ["Diverged", "Diverged"]
    events = (runs.folder / "diverged" / "events.jsonl").read_text().splitlines()
    assert "rollback" in [json.loads(line)["event"] for line in events]


def test_what_weights_in_shares_cannot_do_is_refused_before_the_first_step(runs: Runs) -> None:
    (compiled, laid_out), other = (rank["refused"] for rank in runs.results)
    assert "omit run.shard or run.compile" in compiled
    assert 'set run.channels_last to "auto" or "no"' in laid_out
    assert other == [compiled, laid_out]
    assert not (runs.folder / "refused").exists()


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


def test_torchrun_shares_the_weights_out_with_one_writer_and_one_voice(
    tmp_path: Path,
) -> None:
    done = torchrun(*DIGITS, "--shard", "--out", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").open()]
    assert events == ["start", "epoch", "epoch", "end"]
    assert '"shard": true' in (tmp_path / "run" / "config.json").read_text()
