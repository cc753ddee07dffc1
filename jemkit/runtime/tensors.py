"""Many tensors at once: one kernel on a GPU for all of a kind, where each had one of its own."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def cloned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each, which shares no memory with it."""
    found = [torch.empty_like(t) for t in tensors]
    copy(found, tensors)
    return found


@torch.no_grad()
def copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write each value into its tensor; torch copies those of one device and type together."""
    kinds: dict[object, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, value in zip(into, values, strict=True):
        ours, theirs = kinds[target.device, target.dtype, value.device, value.dtype]
        ours.append(target)
        theirs.append(value)
    for ours, theirs in kinds.values():
        torch._foreach_copy_(ours, theirs)
