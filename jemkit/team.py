"""A run by several processes: the first one leads and decides, the others follow its orders.

The leader trains as if it were alone: it alone judges, saves, stops and goes back. What all do is
a step, and the handing over of state; each begins with an order. So no two processes can disagree.
"""

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from jemkit.backbone import Backbone, Task
from jemkit.density import Buffered, ContrastiveDensity
from jemkit.energy import EnergyModel
from jemkit.errors import ConfigError, Diverged, MisfitError
from jemkit.runtime import distributed, numerics, sharding, trees
from jemkit.runtime.ledger import Shard
from jemkit.seeds import generator
from jemkit.update import Stateful, Updater

if TYPE_CHECKING:
    from jemkit.assembly import Assembly
    from jemkit.recipe import Run

log = logging.getLogger(__name__)

State = dict[str, Any]


def split(backbone: Backbone, rng: Generator, seed: int) -> Generator:
    """Give each process its slots of the buffer, and chains a stream of their own.

    The model and the whole buffer were drawn alike by all; the first process goes on with that
    stream, as a process that is alone does.
    """
    me = distributed.shard()
    if me.size == 1:
        return rng
    if backbone.has_density and isinstance(backbone.density, Buffered):
        buffer = backbone.density.buffer
        check_slots(buffer.options.capacity, backbone, me)
        capacity = buffer.options.capacity // me.size
        buffer.options = buffer.options.model_copy(update={"capacity": capacity})
        buffer.states = buffer.states[me.rank :: me.size].clone()
    return rng if me.rank == 0 else generator(rng.device, seed, "chains", me.rank)


def check_slots(capacity: int, backbone: Backbone, me: Shard) -> None:
    """Refuse a buffer that the processes could not share evenly, class by class."""
    buffer = backbone.density.buffer if isinstance(backbone.density, Buffered) else None
    shares = me.size
    if buffer is not None and buffer.options.conditional:
        shares *= buffer.n_classes
    if capacity % shares:
        raise ConfigError(
            f"{me.size} processes cannot share a buffer of {capacity} slots evenly; set "
            f"backbone.buffer.capacity to a multiple of {shares}"
        )


@contextmanager
def leading() -> Iterator[None]:
    """The first process's block, at whose end it lets the others go.

    Where a step was broken off the others are still inside it: whoever started them ends them.
    """
    try:
        yield
    finally:
        if distributed.shard().size > 1 and not _inside.get():
            distributed.tell({"do": "end"})


_inside: ContextVar[bool] = ContextVar("inside", default=False)


@contextmanager
def stepping(parts: "Assembly") -> Iterator[None]:
    """The leader's step, which the others are told to take with it."""
    if distributed.shard().size == 1:
        yield
        return
    density = parts.backbone.density if parts.backbone.has_density else None
    penalty = density.options.penalty if isinstance(density, ContrastiveDensity) else 0.0
    steps = density.steps if density else 0
    rate = parts.optimizer.param_groups[0]["lr"]
    distributed.tell({"do": "step", "lr": rate, "steps": steps, "penalty": penalty})
    _inside.set(True)
    with distributed.together():
        alike(parts)
        try:
            yield
        except Diverged:  # all processes found the same
            _inside.set(False)
            raise
    _inside.set(False)


def leads() -> bool:
    """Whether this process is the first of its group, or alone."""
    return distributed.shard().rank == 0


def ask(what: str) -> None:
    """The leader has the others do what it begins with."""
    if distributed.shard().size > 1 and leads():
        distributed.tell({"do": what})


def laid_out(backbone: Backbone, run: "Run", task: Task) -> tuple[EnergyModel, EnergyModel | None]:
    """The model as the run holds it; of one in shares also a twin on the leader's host."""
    model, device = backbone.model, next(backbone.model.parameters()).device
    if not run.shard or distributed.shard().size == 1:
        if run.shard:
            log.warning("run.shard does nothing for one process: torchrun starts several")
        numerics.laid_out(model, run.channels_last, device)
        return model, None
    sharding.check_options(compiled=run.compile, channels_last=run.channels_last)
    by_stem = backbone.has_density and backbone.density.sampler.needs_stem
    sharding.check(model, model.network, by_stem=by_stem)
    twin = copy.deepcopy(model).to("cpu") if leads() else None
    sharding.shard(model, torch.zeros((1, *task.shape), device=device))
    return model, twin


def checked(updater: Updater, model: EnergyModel) -> Updater:
    """The updater, unless it remembers what nobody could share out again."""
    if isinstance(updater, Stateful) and sharding.is_shared(next(model.parameters())):
        raise MisfitError(
            f"run.shard: the updater {type(updater).__name__} keeps a state of its own, which "
            "jemkit cannot deal out; choose plain, sam or awp, or leave run.shard out"
        )
    return updater


@contextmanager
def alone(parts: "Assembly") -> Iterator[None]:
    """A block in which the leader looks at the model while the others wait.

    Where weights lie in shares they are gathered once, and the block sees a whole copy of model
    and average: how many passes it takes is then nobody else's business.
    """
    if parts.twin is None:
        yield
        return
    ask("weights")
    weights = parts.weights()
    backbone, ema, twin = parts.backbone, parts.ema, parts.twin.to(parts.device)
    twin.load_state_dict(weights["model"])
    shares, average = backbone.model, ema.average if ema else {}
    backbone.model = twin
    if ema is not None:
        ema.average = weights["ema"]
    try:
        yield
    finally:
        backbone.model = shares
        if ema is not None:
            ema.average = average
        twin.to("cpu")


def alike(parts: "Assembly") -> None:
    """Before the first step: the leader's weights, whatever it was told to begin with."""
    if parts.loader.step == 0:
        weights = parts.backbone.model.state_dict().values()
        distributed.broadcast(t for t in weights if not sharding.is_shared(t))


def begin_with(parts: "Assembly", weights: dict[str, Tensor]) -> None:
    """Give every process its part of weights that the leader alone has read, where it has one.

    Whole ones it hands on before the first step.
    """
    if parts.twin is not None:
        parts.load_state_dict({**parts.state_dict(), "model": weights})


def gathered(own: State) -> State:
    """The leader's own state, and under `ranks` that of every other process; all call it."""
    if distributed.shard().size == 1:
        return own
    _, *others = distributed.gather(packed(own))
    return {**own, "ranks": [unpacked(tensors) for tensors in others]}


def handed_on(state: State) -> State:
    """The same, once every other process has it too."""
    if distributed.shard().size > 1:
        distributed.tell({"do": "load"})
        distributed.share(packed(state))
    return state


def share_of(state: State, rng: Tensor) -> State:
    """This process's own part of a saved state: bit for bit where as many processes saved it.

    Among others the buffer is dealt out anew, and who was not there draws from `rng`.
    """
    me = distributed.shard()
    own = {name: state[name] for name in ("density", "objective", "rng")}
    ranks = [own, *state.get("ranks", [])]
    if len(ranks) == me.size:
        return ranks[me.rank]  # type: ignore[no-any-return]
    if me.rank == 0:
        log.warning(
            "saved by %d process(es) and gone on with by %d: the buffer is dealt out anew, and the "
            "run will not be bit for bit the one that it would have been",
            len(ranks),
            me.size,
        )
    density = dealt([r["density"] for r in ranks], me) if own["density"] else None
    there = me.rank < len(ranks)
    return {**own, "density": density, "rng": ranks[me.rank]["rng"] if there else rng}


def dealt(saved: list[State], me: Shard) -> State:
    """A buffer's slots, every `me.size`-th of them; which were every len(saved)-th."""
    if any(set(density) != {"states", "drawn"} for density in saved):
        raise MisfitError(
            f"this density's state cannot be dealt out anew: go on with {len(saved)} process(es)"
        )
    states = torch.stack([density["states"] for density in saved], dim=1).flatten(0, 1)
    drawn = sum(int(density["drawn"]) for density in saved)
    return {"states": states[me.rank :: me.size], "drawn": drawn // me.size}


def packed(state: State) -> dict[str, Tensor]:
    """A state as tensors alone."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(trees.packed(state, "", tensors)).encode()
    return {**tensors, TREE: torch.tensor(list(tree), dtype=torch.uint8)}


def unpacked(tensors: dict[str, Tensor]) -> State:
    tree = json.loads(bytes(tensors[TREE].tolist()))
    return trees.unpacked(tree, tensors)  # type: ignore[no-any-return]


TREE = "tree"
