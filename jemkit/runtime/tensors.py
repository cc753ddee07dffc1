"""Many tensors at once, with one kernel on a GPU for all tensors of a type."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def cloned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors, in their own memory."""
    clones = [torch.empty_like(t) for t in tensors]
    copy(clones, tensors)
    return clones


@torch.no_grad()
def copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its tensor; torch groups them by device and type."""
    kinds: dict[object, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, value in zip(into, values, strict=True):
        ours, theirs = kinds[target.device, target.dtype, value.device, value.dtype]
        ours.append(target)
        theirs.append(value)
    for ours, theirs in kinds.values():
        torch._foreach_copy_(ours, theirs)
