"""The FLOPs of a step: every operation that torch counts, with its shapes and its count."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from jemkit.backbone import Backbone
from jemkit.data import Batch
from jemkit.objective import Objective, Terms
from jemkit.runtime.modes import frozen_batch_stats
from jemkit.updaters import Guard, UpdaterSpec


@dataclass(frozen=True)
class Like:
    """A tensor's shape, dtype and layout: all that the cost of an operation depends on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> "Like":
        return cls(tuple(t.shape), tuple(t.stride()), t.dtype)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self, rng: Generator) -> Tensor:
        t = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=rng.device)
        return t.normal_(generator=rng) if self.dtype.is_floating_point else t.zero_()


class Operation(NamedTuple):
    """One call that does FLOPs; equal calls compare equal, so that they can be counted."""

    name: str  # such as aten.convolution.default
    arguments: tuple[Any, ...]  # tensors as Like, lists as tuples
    flops: int
    bytes: int  # read and written, each operand once

    @property
    def function(self) -> Callable[..., Any]:
        operator: Any = torch.ops
        for part in self.name.split("."):
            operator = getattr(operator, part)
        return operator  # type: ignore[no-any-return]

    def call(self, rng: Generator) -> Callable[[], Any]:
        """The operation on noise, for timing."""
        filled = tree_map(lambda v: v.tensor(rng) if isinstance(v, Like) else v, self.arguments)
        function = self.function
        return lambda: function(*filled)


Work = Counter[Operation]
"""How often each operation is called."""


def flops(work: Work) -> int:
    return sum(operation.flops * calls for operation, calls in work.items())


def traffic(work: Work) -> int:
    """Bytes that the operations read and write, as if everything between them were fused."""
    return sum(operation.bytes * calls for operation, calls in work.items())


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation for which torch's flop counter has a formula."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: Work = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            tensors = [t for t in tree_flatten((args, out))[0] if isinstance(t, Tensor)]
            operation = Operation(
                str(func),
                _hashable(tree_map(lambda v: Like.of(v) if isinstance(v, Tensor) else v, args)),
                int(formula(*args, **(kwargs or {}), out_val=out)),
                sum(Like.of(t).bytes for t in tensors),
            )
            self.work[operation] += 1
        return out


@contextmanager
def counted() -> Iterator[Work]:
    """The operations inside the block."""
    with Recorder() as recorder:
        yield recorder.work


class StepWork(NamedTuple):
    """The FLOPs of a training step."""

    draw: Work  # of its chains
    update: Work  # of one evaluation of the loss and its gradient
    updates: int  # how many of them: 1 for plain descent, 2 under SAM

    @property
    def whole(self) -> Work:
        return self.draw + Counter({op: self.updates * n for op, n in self.update.items()})


def step_work(
    backbone: Backbone,
    objective: Objective[Any],
    updater: UpdaterSpec,
    batch: Batch,
    theta_steps: int = 1,
) -> StepWork:
    """A step's FLOPs, counted while one is computed; buffer and statistics are restored."""
    rng = Generator(batch.x.device).manual_seed(0)
    density = backbone.density_or_none
    if density is not None:
        density.mark()
    try:
        with counted() as draw:
            draws = objective.draw(backbone, batch, rng)
        with counted() as update, frozen_batch_stats(backbone.model):
            trainable = [p for p in backbone.model.parameters() if p.requires_grad]
            loss = objective.loss(backbone, batch, draws).total
            torch.autograd.grad(loss, trainable, allow_unused=True)
    finally:
        if density is not None:
            density.rollback()
    return StepWork(draw, update, theta_steps * takings(updater))


def takings(updater: UpdaterSpec) -> int:
    """How often an updater evaluates the loss in one step."""
    model, calls = nn.Linear(1, 1), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def terms() -> Terms:
        nonlocal calls
        calls += 1
        return Terms.weighted({"toy": (1.0, model(torch.ones(1, 1)).sum())})

    updater.build(model, optimizer).step(terms, Guard())
    return calls


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
