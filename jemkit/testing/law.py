"""The error of a violated requirement, and checks shared by many kinds of parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from jemkit.runtime.pytree import same


class ConformanceError(AssertionError):
    """A part that violates a law of its kind; the message states the requirement."""

    def __init__(self, message: str, law: str = "") -> None:
        super().__init__(message)
        self.law = law


class Tried(NamedTuple):
    """One requirement that a check has tested."""

    law: str
    requirement: str
    holds: bool
    result: str  # of the part; "" where the requirement says all


_TRIED: ContextVar[list[Tried] | None] = ContextVar("tried", default=None)


@contextmanager
def recorded() -> Iterator[list[Tried]]:
    """Collects the requirements that the block tests; one that is violated raises nothing."""
    tried: list[Tried] = []
    token = _TRIED.set(tried)
    try:
        yield tried
    finally:
        _TRIED.reset(token)


def require(holds: bool, part: object, law: str, requirement: str, result: str = "") -> None:
    """Raise ConformanceError with the requirement if it is violated, or record it in `recorded`."""
    tried = _TRIED.get()
    if tried is not None:
        tried.append(Tried(law, requirement, holds, result))
    elif not holds:
        name = part.__name__ if isinstance(part, type) else type(part).__name__
        raise ConformanceError(f"{name}: {requirement}" + (f"; {result}" if result else ""), law)


def gave(value: object) -> str:
    """The result of a part in a message."""
    return f"it gave {description(value)}"


def description(value: object) -> str:
    """A short description of a value."""
    if isinstance(value, Tensor):
        graph = ", attached to a graph" if value.requires_grad else ""
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}{graph}"
    return repr(value) if value is None else f"a {type(value).__name__}"


def require_kind(
    value: object, kind: type | tuple[type, ...], part: object, requirement: str
) -> None:
    """Raise ConformanceError with a description of the value if it has another type."""
    require(isinstance(value, kind), part, "interface", requirement, gave(value))


def require_tensor(
    value: object,
    part: object,
    what: str,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    attached: bool | None = False,
) -> None:
    """Checks a tensor that a part returns: type, shape, dtype, finite, detached.

    `attached` is whether it belongs to a graph; None allows both.
    """
    came, name = gave(value), str(dtype).removeprefix("torch.")
    require(isinstance(value, Tensor), part, "shape", f"{what} is a tensor {list(shape)}", came)
    if not isinstance(value, Tensor):
        return
    same_shape = tuple(value.shape) == shape
    require(same_shape, part, "shape", f"{what} has the shape {list(shape)}", came)
    require(value.dtype == dtype, part, "dtype", f"{what} is of {name}", came)
    require(bool(value.isfinite().all()), part, "finite", f"{what} is finite")
    if attached is False:
        law = f"{what} is detached and carries no graph"
        require(not value.requires_grad, part, "detached", law, came)
    if attached is True:
        law = f"{what} is attached to its inputs' graph"
        require(value.requires_grad, part, "differentiable", law, came)


@contextmanager
def unchanged(part: object, what: str, *given: Tensor) -> Iterator[None]:
    """Checks that the block does not change the tensors given to a part."""
    before = [(t.detach().clone(), t.requires_grad) for t in given]
    yield
    for t, (value, required_grad) in zip(given, before, strict=True):
        require(same(t.detach(), value), part, "inputs", f"leaves {what} alone")
        law = f"leaves `requires_grad` and `.grad` of {what} alone"
        alone = t.requires_grad == required_grad and (not t.is_leaf or t.grad is None)
        require(alone, part, "inputs", law)


def require_own_generator(before: Tensor, part: object) -> None:
    """Checks that torch's global generator is as it was."""
    law = "draws from the generator that it is given, never from torch's own"
    require(torch.equal(before, torch.get_rng_state()), part, "generator", law)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a chain must not change."""
    return {
        "tensors": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "grads": {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        },
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: m.training for name, m in model.named_modules()},
    }


@contextmanager
def untouched(model: nn.Module, part: object) -> Iterator[None]:
    """Checks that the block changes neither the model nor torch's global generator."""
    before, random = state_of(model), torch.get_rng_state()
    switches = torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    law = "leaves torch's own switches alone: whether gradients are recorded, and the default type"
    now = torch.is_grad_enabled(), torch.get_default_dtype()
    require(switches == now, part, "switches", law)
    after = state_of(model)
    for what, label, name in (
        ("modes", "train and eval modes", "modes"),
        ("grads", "`.grad`, which only an updater fills by backward,", "gradients"),
        ("requires_grad", "`requires_grad`", "weights"),
        ("tensors", "parameters and buffers", "weights"),
    ):
        require(same(before[what], after[what]), part, name, f"leaves the model's {label} alone")
    require_own_generator(random, part)


def plain(tree: Any) -> list[Tensor]:
    """Every tensor in a tree of tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
