"""A run by several processes: the first one leads and decides, the others follow its orders.

The leader trains as if it were alone: it alone judges, saves, stops and goes back. What all do is
a step, and the handing over of state; each begins with an order. So no two processes can disagree.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from jemkit.backbone import Backbone
from jemkit.density import Buffered, ContrastiveDensity
from jemkit.errors import ConfigError, Diverged, MisfitError
from jemkit.runtime import distributed, trees
from jemkit.runtime.ledger import Shard
from jemkit.seeds import generator

if TYPE_CHECKING:
    from jemkit.assembly import Assembly

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


def build() -> None:
    """The leader has the others put the same run together."""
    if distributed.shard().size > 1 and distributed.shard().rank == 0:
        distributed.tell({"do": "build"})


def alike(parts: "Assembly") -> None:
    """Before the first step: the leader's weights, whatever it was told to begin with."""
    if parts.loader.step == 0:
        distributed.broadcast(parts.backbone.model.state_dict().values())


def gathered(own: State) -> State:
    """The leader's own state, and under `ranks` that of every other process."""
    if distributed.shard().size == 1:
        return own
    distributed.tell({"do": "state"})
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
