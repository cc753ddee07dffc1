"""The FLOPs of a step: every operation that torch counts, with its shapes and its count."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from jemkit.backbone import Backbone
from jemkit.data import Batch
from jemkit.models.energy import EnergyModel
from jemkit.objective import Objective, Terms
from jemkit.runtime.modes import eval_mode, frozen, frozen_batch_stats
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
        size: int = torch.Size(self.shape).numel() * self.dtype.itemsize
        return size

    def tensor(self, rng: Generator) -> Tensor:
        """Noise of this shape and layout."""
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
        filled = [_filled(argument, rng) for argument in self.arguments]
        function = self.function
        return lambda: function(*filled)


Work = Mapping[Operation, int]
"""Operations, and how often each is called."""


def flops(work: Work) -> int:
    return sum(operation.flops * calls for operation, calls in work.items())


def traffic(work: Work) -> int:
    """Bytes that the operations read and write, as if everything between them were fused."""
    return sum(operation.bytes * calls for operation, calls in work.items())


def times(work: Work, n: int) -> Work:
    return {operation: n * calls for operation, calls in work.items()}


def together(*works: Work) -> Work:
    total: dict[Operation, int] = {}
    for work in works:
        for operation, calls in work.items():
            total[operation] = total.get(operation, 0) + calls
    return total


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation for which torch's flop counter has a formula."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: dict[Operation, int] = {}

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
            self.work[operation] = self.work.get(operation, 0) + 1
        return out


@contextmanager
def counted() -> Iterator[dict[Operation, int]]:
    """The operations inside the block, which computes as usual."""
    with Recorder() as recorder:
        yield recorder.work


@contextmanager
def imagined() -> Iterator[dict[Operation, int]]:
    """The operations inside the block, without computing them: only shapes are propagated."""
    with FakeTensorMode(allow_non_fake_inputs=True), counted() as work:
        yield work


class Passes(NamedTuple):
    """The FLOPs of a batch in a network, by part."""

    forward: Work
    to_input: Work  # backward to the images, weights frozen
    to_weights: Work  # backward to every weight, and through the layers between


def passes(model: EnergyModel, x: Tensor) -> Passes:
    """One forward pass of x [B, C, H, W], and each backward pass from the mean energy."""
    with eval_mode(model):
        with imagined() as forward, torch.no_grad():
            model(x)
        with imagined() as both, frozen(model), torch.enable_grad():
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(model(leaf).energy.sum(), leaf)
        with imagined() as whole, torch.enable_grad():
            _gradients(model, model(x).energy.mean())
    return Passes(forward, less(both, forward), less(whole, forward))


def less(whole: Work, part: Work) -> Work:
    """`whole` without `part`."""
    rest = {operation: calls - part.get(operation, 0) for operation, calls in whole.items()}
    return {operation: calls for operation, calls in rest.items() if calls}


class StepWork(NamedTuple):
    """The FLOPs of a training step: its chains, one evaluation of the loss and its gradient, and
    how often the latter."""

    draw: Work
    update: Work
    updates: int  # 1 for plain descent, 2 under SAM

    @property
    def whole(self) -> Work:
        return together(self.draw, times(self.update, self.updates))


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
            _gradients(backbone.model, objective.loss(backbone, batch, draws).total)
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


def _gradients(model: nn.Module, loss: Tensor) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, trainable, allow_unused=True)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _filled(value: Any, rng: Generator) -> Any:
    if isinstance(value, Like):
        return value.tensor(rng)
    return [_filled(item, rng) for item in value] if isinstance(value, tuple) else value
