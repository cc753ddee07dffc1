"""The error of a violated requirement, and checks shared by many kinds of parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from jemkit.runtime.pytree import same


class ConformanceError(AssertionError):
    """A part that violates a requirement of its kind; the message states the requirement."""


def require(holds: bool, part: object, law: str) -> None:
    """Raise ConformanceError with the requirement if it is violated."""
    if not holds:
        name = part.__name__ if isinstance(part, type) else type(part).__name__
        raise ConformanceError(f"{name}: {law}")


def description(value: object) -> str:
    """A short description of a value."""
    if isinstance(value, Tensor):
        graph = ", attached to a graph" if value.requires_grad else ""
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}{graph}"
    return repr(value) if value is None else f"a {type(value).__name__}"


def require_kind(value: object, kind: type | tuple[type, ...], part: object, law: str) -> None:
    """Raise ConformanceError with a description of the value if it has another type."""
    require(isinstance(value, kind), part, f"{law}; it gave {description(value)}")


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
    came = f"; it gave {description(value)}"
    require(isinstance(value, Tensor), part, f"{what} is a tensor {list(shape)}{came}")
    if not isinstance(value, Tensor):
        return
    require(tuple(value.shape) == shape, part, f"{what} has the shape {list(shape)}{came}")
    require(value.dtype == dtype, part, f"{what} is of {str(dtype).removeprefix('torch.')}{came}")
    require(bool(value.isfinite().all()), part, f"{what} is finite")
    if attached is False:
        require(not value.requires_grad, part, f"{what} is detached and carries no graph{came}")
    if attached is True:
        require(value.requires_grad, part, f"{what} is attached to its inputs' graph{came}")


@contextmanager
def unchanged(part: object, what: str, *given: Tensor) -> Iterator[None]:
    """Checks that the block does not change the tensors given to a part."""
    before = [(t.detach().clone(), t.requires_grad) for t in given]
    yield
    for t, (value, required_grad) in zip(given, before, strict=True):
        require(same(t.detach(), value), part, f"leaves {what} alone")
        law = f"leaves `requires_grad` and `.grad` of {what} alone"
        require(t.requires_grad == required_grad and (not t.is_leaf or t.grad is None), part, law)


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
    require(switches == (torch.is_grad_enabled(), torch.get_default_dtype()), part, law)
    after = state_of(model)
    for what, label in (
        ("tensors", "parameters and buffers"),
        ("grads", "`.grad`, which only an updater fills by backward,"),
        ("requires_grad", "`requires_grad`"),
        ("modes", "train and eval modes"),
    ):
        require(same(before[what], after[what]), part, f"leaves the model's {label} alone")
    own = torch.equal(random, torch.get_rng_state())
    require(own, part, "draws from the generator that it is given, never from torch's own")


def plain(tree: Any) -> list[Tensor]:
    """Every tensor in a tree of tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
