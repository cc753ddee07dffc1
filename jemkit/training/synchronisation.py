"""What several processes do together around a step: the leader's weights, and looks at them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from jemkit.errors import Diverged
from jemkit.runtime import distributed, fsdp
from jemkit.training.leader import INSIDE_STEP, ask

if TYPE_CHECKING:
    from jemkit.training.build import RunState


@contextmanager
def synchronised_step(parts: "RunState") -> Iterator[None]:
    """The leader's step, which the others are told to take with it."""
    if distributed.shard().size == 1:
        yield
        return
    density = parts.backbone.density if parts.backbone.has_density else None
    penalty = parts.backbone.penalised
    steps = density.steps if density else 0
    rate = parts.optimizer.param_groups[0]["lr"]
    distributed.tell({"do": "step", "lr": rate, "steps": steps, "penalty": penalty})
    INSIDE_STEP.set(True)
    with distributed.together():
        broadcast_weights(parts)
        try:
            yield
        except Diverged:  # all processes found the same
            INSIDE_STEP.set(False)
            raise
    INSIDE_STEP.set(False)


@contextmanager
def alone(parts: "RunState") -> Iterator[None]:
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


def broadcast_weights(parts: "RunState") -> None:
    """Before the first step: the leader's weights, whatever it was told to begin with."""
    if parts.loader.step == 0:
        weights = parts.backbone.model.state_dict().values()
        distributed.broadcast(t for t in weights if not fsdp.is_shared(t))


def begin_with(parts: "RunState", weights: dict[str, Tensor]) -> None:
    """Give every process its part of weights that the leader alone has read, where it has one.

    Whole ones it hands on before the first step.
    """
    average = weights if parts.ema else None
    parts.load_state_dict({**parts.state_dict(), "model": weights, "ema": average})
