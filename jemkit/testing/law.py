"""The error of a broken law, and what many laws watch: a model and torch's own generator."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from jemkit.checkpoint import same


class ConformanceError(AssertionError):
    """A part that breaks a law of its kind; the message is the law."""


def require(kept: bool, part: object, law: str) -> None:
    """Raise ConformanceError with the law where it is not kept."""
    if not kept:
        name = part.__name__ if isinstance(part, type) else type(part).__name__
        raise ConformanceError(f"{name}: {law}")


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a chain must leave alone."""
    return {
        "tensors": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "grads": {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        },
        "asked": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: m.training for name, m in model.named_modules()},
    }


@contextmanager
def untouched(model: nn.Module, part: object) -> Iterator[None]:
    """The model comes out of the block as it went in, and torch's own generator too."""
    before, random = state_of(model), torch.get_rng_state()
    yield
    after = state_of(model)
    for what, label in (
        ("tensors", "parameters and buffers"),
        ("grads", "`.grad`"),
        ("asked", "`requires_grad`"),
        ("modes", "train and eval modes"),
    ):
        require(same(before[what], after[what]), part, f"leaves the model's {label} alone")
    own = torch.equal(random, torch.get_rng_state())
    require(own, part, "draws from the generator that it is given, never from torch's own")


def plain(tensors: Any) -> list[Tensor]:
    """Every tensor in a tree of tuples, lists and dicts."""
    if isinstance(tensors, Tensor):
        return [tensors]
    if isinstance(tensors, dict):
        tensors = list(tensors.values())
    if isinstance(tensors, list | tuple):
        return [t for item in tensors for t in plain(item)]
    return []
