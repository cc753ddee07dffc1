"""What each process has of a run: its slots of the buffer and its random stream."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from jemkit.backbone import Backbone
from jemkit.errors import ConfigError, MisfitError
from jemkit.runtime import distributed
from jemkit.runtime.rng import generator
from jemkit.runtime.work_cache import WHOLE, Shard
from jemkit.sampling.density import Buffered, Density

log = logging.getLogger(__name__)

State = dict[str, Any]


def split(backbone: Backbone, rng: Generator, seed: int) -> Generator:
    """Give each process its slots of the buffer, and its chains a random stream of their own.

    All processes drew the same model and the same whole buffer. Rank 0 continues that random
    stream, as a single process does.
    """
    me = distributed.shard()
    if me.size == 1:
        return rng
    density = backbone.density_or_none
    if isinstance(density, Buffered):
        buffer, capacity = density.buffer, density.buffer.options.capacity
        shares = me.size * (buffer.n_classes if buffer.options.conditional else 1)
        if capacity % shares:
            raise ConfigError(
                f"{me.size} processes cannot divide a buffer of {capacity} slots evenly; set "
                f"backbone.buffer.capacity to a multiple of {shares}"
            )
        own = {"capacity": capacity // me.size}
        buffer.options = buffer.options.model_copy(update=own)
        buffer.states = buffer.states[me.rank :: me.size].clone()
    return rng if me.rank == 0 else generator(rng.device, seed, "chains", me.rank)


def share_of(state: State, rng: Tensor, density: Density | None, *, ended: bool = False) -> State:
    """This process's part of a saved state: bit for bit if the number of processes is unchanged.

    Otherwise the buffer is redistributed, and a new process draws from `rng`; a finished run draws
    no more, so there is no warning.
    """
    me = distributed.shard()
    own = {name: state[name] for name in ("density", "objective", "rng")}
    ranks = [own, *state.get("ranks", [])]
    if len(ranks) == me.size:
        return ranks[me.rank]  # type: ignore[no-any-return]
    if me.rank == 0 and not ended:
        log.warning(
            "saved by %d process(es) and resumed by %d: the buffer is redistributed, and the run "
            "is not bit-for-bit identical to an uninterrupted one",
            len(ranks),
            me.size,
        )
    share = reshard_state([r["density"] for r in ranks], density, me) if density else None
    there = me.rank < len(ranks)
    return {**own, "density": share, "rng": ranks[me.rank]["rng"] if there else rng}


def gather_state(state: State, density: Density) -> State:
    """A saved density's state for one process, whatever the number of processes that saved it."""
    saved = [part["density"] for part in (state, *state.get("ranks", []))]
    return saved[0] if len(saved) == 1 else reshard_state(saved, density, WHOLE)


@runtime_checkable
class Resharded(Protocol):
    """A density whose state can be redistributed over another number of processes.

    `deals` declares for each entry of its state what a process has of it: "slots", every N-th row
    of a tensor; "count", a number that is summed; "same", equal in all processes.
    """

    deals: Mapping[str, str]


def reshard_state(saved: list[State], density: Density, me: Shard) -> State:
    """This process's part of the states that len(saved) processes had."""
    declared = density.deals if isinstance(density, Resharded) else {}
    deals = {name: "same" if how == "alike" else how for name, how in declared.items()}  # of 0.1
    if any(set(deals) != set(state) for state in saved) or not {*deals.values()} <= {*DEALS}:
        raise MisfitError(
            f"this density's state cannot be redistributed: resume with {len(saved)} "
            f"process(es), or declare in {type(density).__name__}.deals how each of "
            f"{', '.join(sorted(saved[0]))} is distributed: {', '.join(DEALS)}"
        )
    try:
        parts = {name: [state[name] for state in saved] for name in deals}
        return {name: DEALS[how](parts[name], me) for name, how in deals.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        what = "the processes' parts of a density do not fit together"
        raise MisfitError(f"{what}: {error}") from None


DEALS: dict[str, Callable[[list[Any], Shard], Any]] = {
    # every `size`-th row of those of which each part has every len(parts)-th
    "slots": lambda parts, me: torch.stack(parts, dim=1).flatten(0, 1)[me.rank :: me.size],
    "count": lambda parts, me: sum(map(int, parts)) // me.size,
    "same": lambda parts, _: parts[0],
}
