"""A run by several processes: the first one leads and decides, the others follow its orders.

The leader trains as if it were alone: it alone judges, saves, stops and goes back. What all do is
a step, and the handing over of state; each begins with an order. So no two processes can disagree.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from jemkit.backbone import Backbone
from jemkit.data import Task
from jemkit.errors import JemkitError, MisfitError
from jemkit.models.energy import EnergyModel
from jemkit.runtime import distributed, fsdp, pytree
from jemkit.training.memory_format import laid_out as lay_out
from jemkit.updaters import Stateful, Updater

if TYPE_CHECKING:
    from jemkit.config.recipe import Run


log = logging.getLogger(__name__)

State = dict[str, Any]

BACKENDS = ("gloo", "Gloo", "NCCL")
"""Which name themselves in the errors of their collectives."""


@contextmanager
def losses_told() -> Iterator[None]:
    """A block whose collectives that fail, since a process is gone, end in one sentence."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = isinstance(error, dist.DistError) or any(name in text for name in BACKENDS)
        if distributed.shard().size == 1 or not lost:
            raise
        raise JemkitError(
            f"another process was lost ({text.splitlines()[0]}). Every checkpoint is "
            "kept: the same command with --resume goes on, torchrun --max-restarts by itself"
        ) from None


@contextmanager
def leading() -> Iterator[None]:
    """The first process's block, at whose end it lets the others go.

    Where a step was broken off the others are still inside it: whoever started them ends them.
    """
    try:
        yield
    finally:
        if distributed.shard().size > 1 and not INSIDE_STEP.get():
            distributed.tell({"do": "end"})


INSIDE_STEP: ContextVar[bool] = ContextVar("inside", default=False)


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
            log.warning(
                "run.shard shares nothing out in one process; the weights only lie as shares do, "
                "not channels last"
            )
        lay_out(model, run.layout, device)
        return model, None
    fsdp.check_options(compiled=run.compile, channels_last=run.channels_last)
    by_stem = backbone.has_density and backbone.density.sampler.needs_stem
    fsdp.check(model, model.network, by_stem=by_stem)
    twin = copy.deepcopy(model).to("cpu") if leads() else None
    fsdp.shard(model, torch.zeros((1, *task.shape), device=device))
    return model, twin


def checked(updater: Updater, model: EnergyModel) -> Updater:
    """The updater, unless it remembers what nobody could share out again."""
    if isinstance(updater, Stateful) and fsdp.is_shared(next(model.parameters())):
        raise MisfitError(
            f"run.shard: the updater {type(updater).__name__} keeps a state of its own, which "
            "jemkit cannot deal out; choose plain, sam or awp, or leave run.shard out"
        )
    return updater


def gathered(own: State) -> State:
    """The leader's own state, and under `ranks` that of every other process; all call it."""
    if distributed.shard().size == 1:
        return own
    _, *others = distributed.gather(packed(own))
    return {**own, "ranks": [unpacked(tensors) for tensors in others]}


def broadcast_state(state: State) -> State:
    """The same, once every other process has it too."""
    if distributed.shard().size > 1:
        distributed.tell({"do": "load"})
        distributed.share(packed(state))
    return state


def renewed(attempt: int, own: Callable[[], int]) -> int:
    """The leader begins the chains of another attempt by `own`, and all do; their counts' sum."""
    if distributed.shard().size == 1:
        return own()
    distributed.tell({"do": "renew", "attempt": attempt})
    return sum(int(part["n"]) for part in distributed.gather({"n": torch.tensor(own())}))


def packed(state: State) -> dict[str, Tensor]:
    """A state as tensors alone."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(pytree.packed(state, "", tensors)).encode()
    return {**tensors, TREE: torch.tensor(list(tree), dtype=torch.uint8)}


def unpacked(tensors: dict[str, Tensor]) -> State:
    tree = json.loads(bytes(tensors[TREE].tolist()))
    return pytree.unpacked(tree, tensors)  # type: ignore[no-any-return]


TREE = "tree"
