"""Updaters: how the terms update the weights; and the guard against non-finite values."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from jemkit.backbone import Backbone
from jemkit.data import Batch
from jemkit.errors import Diverged
from jemkit.objective import Terms
from jemkit.options import Options
from jemkit.runtime import distributed, fsdp, tensors
from jemkit.runtime.modes import frozen_batch_stats


class Verdict(NamedTuple):
    """The guard's check of one update, as tensors, so that it does not synchronise."""

    update: int  # number of this update, from 1
    finite: Tensor  # bool scalar; on the host, valid once `ready` has passed
    ready: torch.cuda.Event | None
    grad_norm: Tensor  # scalar
    parts: dict[str, Tensor]


class Guard:
    """Applies an update only if loss and gradient are finite.

    On a GPU the decision stays on the device, and the host reads it one update later. By then
    running statistics and the replay buffer may contain non-finite values: call `settle` before
    saving anything.
    """

    def __init__(self) -> None:
        self.verdict: Verdict | None = None
        self.updates = 0

    def update(self, optimizer: Optimizer, terms: Terms) -> None:
        """Step the optimizer, unless something is not finite."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norm = total_norm([g for g in grads if g is not None], terms.total)
        losses = [terms.total.detach(), *(t.detach() for _, t in terms.parts.values())]
        total, *parts = distributed.averages(losses)  # so that all processes decide the same
        finite = norm.isfinite() & total.isfinite()
        earlier, named = self.verdict, dict(zip(terms.parts, parts, strict=True))
        self.updates += 1
        self.verdict = Verdict(self.updates, *_on_the_way(finite), norm, named)
        if self.defers(optimizer, finite):
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            optimizer.step()
            self._judge(earlier)
        else:
            self.settle()
            optimizer.step()

    def defers(self, optimizer: Optimizer, finite: Tensor) -> bool:
        """Whether the optimizer itself skips a non-finite update, so that the host checks later.

        `finite` is a bool tensor of shape [].
        """
        return finite.is_cuda and bool(optimizer.defaults.get("fused"))

    def settle(self) -> None:
        """Raise Diverged if an update was skipped; every call raises again."""
        self._judge(self.verdict)

    def _judge(self, verdict: Verdict | None) -> None:
        if verdict is None:
            return
        if verdict.ready is not None:  # wait for this update only, not for work queued after it
            verdict.ready.synchronize()
        if verdict.finite:
            return
        self.verdict = verdict  # later updates followed a non-finite one
        broken = [f"{name} = {float(t)}" for name, t in verdict.parts.items() if not t.isfinite()]
        what = ", ".join(broken) or f"the gradient (norm {float(verdict.grad_norm)})"
        raise Diverged(f"update {verdict.update}: not finite: {what}; this update was not applied")


def _on_the_way(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """An asynchronous copy to the host, and the event after which it is valid."""
    if not flag.is_cuda:
        return flag, None
    host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record()
    return host, ready


@runtime_checkable
class Updater(Protocol):
    """Owns the optimizer; evaluates the terms as often as its rule needs."""

    optimizer: Optimizer

    def step(self, terms: Callable[[], Terms], guard: Guard) -> None: ...


@runtime_checkable
class Stateful(Protocol):
    """An updater with state besides its optimizer's; checkpoints save it."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class StepAware(Protocol):
    """An updater whose rule depends on the batch, or on how far the run is."""

    total_steps: int  # of the run, set when it is built; 0 if unknown

    def begin(self, backbone: Backbone, batch: Batch) -> None:
        """Called once a step, before its updates."""
        ...


@runtime_checkable
class UpdaterSpec(Protocol):
    """An update rule's options; a registered part."""

    def build(self, model: nn.Module, optimizer: Optimizer) -> Updater: ...


class Plain(Options):
    """One gradient, one step of the optimizer."""

    def build(self, model: nn.Module, optimizer: Optimizer) -> Updater:
        return PlainUpdater(optimizer)


class SAM(Options):
    """Sharpness-aware minimisation (Foret et al. 2021); adaptive is ASAM (Kwon et al. 2021).

        w' = w + rho g / |g|,    adaptive: w' = w + rho w^2 g / |w g|

    g is the gradient of the loss at w; the step is taken at w along the gradient found at w'.
    """

    rho: float = Field(0.05, ge=0)  # size of the move
    adaptive: bool = False  # relative to the size of each weight (ASAM)

    def unused(self) -> dict[str, str]:
        return {} if self.rho else {"adaptive": "where rho is 0"}

    def build(self, model: nn.Module, optimizer: Optimizer) -> Updater:
        return SAMUpdater(model, optimizer, self)


class PlainUpdater:
    """Plain updates by an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, terms: Callable[[], Terms], guard: Guard) -> None:
        guard.update(self.optimizer, backward(self.optimizer, terms))


class SAMUpdater:
    """Computes the gradient at the worst weights nearby, and takes the step from the original
    weights."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, options: SAM) -> None:
        self.model, self.optimizer, self.options = model, optimizer, options

    def step(self, terms: Callable[[], Terms], guard: Guard) -> None:
        backward(self.optimizer, terms)
        with moved_weights(self.ascent()), frozen_batch_stats(self.model):
            perturbed = backward(self.optimizer, terms)
        guard.update(self.optimizer, perturbed)

    def ascent(self) -> dict[nn.Parameter, Tensor]:
        """rho g / |g|, or rho p^2 g / | |p| g |; 0 for a gradient of 0."""
        params = [p for p in self.model.parameters() if p.grad is not None]
        grads = [p.grad.float() for p in params if p.grad is not None]
        if not params:
            return {}
        sizes = [p.detach().abs() for p in params] if self.options.adaptive else None
        scaled = grads if sizes is None else list(torch._foreach_mul(grads, sizes))
        norm = total_norm(scaled, scaled[0])
        shifts = scaled if sizes is None else list(torch._foreach_mul(scaled, sizes))
        factor = torch.where(norm == 0, 0.0, self.options.rho / norm)
        moves = torch._foreach_mul([fsdp.local(shift) for shift in shifts], factor)
        return dict(zip(params, moves, strict=True))


def backward(optimizer: Optimizer, terms: Callable[[], Terms]) -> Terms:
    """New gradients of the total in every `.grad`, averaged over processes.

    Those of FSDP-sharded weights are averaged already.
    """
    optimizer.zero_grad()
    evaluated = terms()
    evaluated.total.backward()  # type: ignore[no-untyped-call]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    distributed.reduce(grad for grad in grads if not fsdp.is_sharded(grad))
    return evaluated


def pooled(terms: Terms, model: nn.Module) -> Terms:
    """Average the logged values over processes, and batch norm's running statistics.

    Without it each process would have its own statistics, and only rank 0's would be saved.
    """
    if distributed.size() == 1:
        return terms
    distributed.reduce(b for b in model.buffers() if b.is_floating_point())
    parts = [part for _, part in terms.parts.values()]
    total, *rest = distributed.averages([terms.total, *parts, *terms.watched.values()])
    averages = iter(rest)
    weighted = {name: (weight, next(averages)) for name, (weight, _) in terms.parts.items()}
    return Terms(weighted, total, dict(zip(terms.watched, averages, strict=True)))


def total_norm(of: list[Tensor], like: Tensor) -> Tensor:
    """The L2 norm of all tensors together, a float32 scalar on their device."""
    if not of:
        return like.new_zeros((), dtype=torch.float32)
    norms = torch._foreach_norm([fsdp.local(t) for t in of])
    each = torch.stack([n.float() for n in norms])
    return fsdp.total(each.square(), of).sqrt()


@contextmanager
def moved_weights(by: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Shift weights inside the block, each by a tensor of its shape [...].

    Afterwards the original values are copied back, not subtracted.
    """
    params = [fsdp.local(p.detach()) for p in by]
    were = tensors.cloned(params)
    with torch.no_grad():
        if params:
            torch._foreach_add_(params, [fsdp.local(shift) for shift in by.values()])
    try:
        yield
    finally:
        tensors.copy(params, were)


class EMA:
    """An exponential moving average of a model's weights; buffers are copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: t.detach().clone() for name, t in model.state_dict().items()}
        named = model.named_parameters(remove_duplicate=False)
        self._weights = {name for name, _ in named}

    @torch.no_grad()
    def update(self, model: nn.Module, n: int | None = None) -> None:
        """Move the average; given n, the updates so far, the decay is (1 + n) / (10 + n) at
        most, and 0 where n is negative."""
        decay = self.decay if n is None else min(self.decay, (1 + n) / (10 + n) if n >= 0 else 0.0)
        live = {name: fsdp.local(t) for name, t in model.state_dict().items()}
        ours = {name: fsdp.local(t) for name, t in self.average.items()}
        if weights := [name for name in live if name in self._weights]:
            torch._foreach_lerp_(
                [ours[name] for name in weights], [live[name] for name in weights], 1 - decay
            )
        rest = [name for name in live if name not in self._weights]
        tensors.copy([ours[name] for name in rest], [live[name] for name in rest])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Use the averaged weights inside the block, the live ones after it."""
        live = {name: t.detach().clone() for name, t in model.state_dict().items()}
        model.load_state_dict(self.average)
        try:
            yield
        finally:
            model.load_state_dict(live)
