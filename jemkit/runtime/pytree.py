"""A run's state as a tree of dicts, lists, tensors and plain values: packed, copied, compared."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from jemkit.errors import DataError


def packed(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON; its tensors are added to `tensors` under their paths."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, dict):
        return {"items": [[k, packed(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [packed(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot contain {type(value).__name__} (at {key})")


def unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree from the JSON that `packed` returned."""
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise DataError("it contains a list, which jemkit never writes")
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        return [unpacked(v, tensors) for v in value["list"]]
    return {k: unpacked(v, tensors) for k, v in value["items"]}


class Snapshot:
    """A copy of a state in host memory, whose memory is reused by the next copy of the same shapes.

    Writing to newly allocated memory takes several times as long.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], Tensor] = {}  # by their paths

    def of(self, tree: Any) -> Any:
        """The tree with every tensor copied; the previous copy is overwritten."""
        values, structure = tree_flatten_with_path(tree)
        self._copies = {
            path: _copied(value.detach(), self._copies.get(path))
            for path, value in values
            if isinstance(value, Tensor)
        }
        if any(t.is_pinned() for t in self._copies.values()):
            torch.cuda.synchronize()  # the copies are asynchronous
        return tree_unflatten([self._copies.get(path, v) for path, v in values], structure)


def _copied(tensor: Tensor, buffer: Tensor | None) -> Tensor:
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor, non_blocking=tensor.is_cuda)


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit."""
    return next(differing(a, b), None) is None


def differing(a: Any, b: Any, at: str = "") -> Iterator[str]:
    """The paths at which two states differ, including values that only one of them has."""
    if isinstance(a, dict) and isinstance(b, dict):
        yield from (f"{at}/{k}" for k in [*a, *b] if k not in a or k not in b)
        for k in a:
            if k in b:
                yield from differing(a[k], b[k], f"{at}/{k}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            yield at or "/"
        for i, (one, other) in enumerate(zip(a, b, strict=False)):
            yield from differing(one, other, f"{at}/{i}")
    elif not _equal(a, b):
        yield at or "/"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()  # NaN equals itself, and -0.0 differs from 0.0
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
