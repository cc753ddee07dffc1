"""A device of pretence: what a GPU refuses is refused without one, and what its host waits for is
counted.

Its tensors say that they are on `meta`, where torch computes nothing, and hold their values on the
CPU. Inside `Elsewhere` an operation that takes tensors of both places raises, as on a GPU, and so
does a generator of one place that is to fill a tensor of the other.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")

WAITS = {
    "aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten._unique2", "aten.bincount",
    "aten.masked_select", "aten.unique_consecutive", "aten.unique_dim",
}  # fmt: skip
"""What a host cannot answer before the device has, beside copies to it and masks as indices."""


INDEXED = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}


class Far(Tensor):
    """A tensor of the device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "Far":
        made: Far = Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), dtype=values.dtype, device=DEVICE,
            storage_offset=values.storage_offset(), layout=values.layout,
        )  # type: ignore[attr-defined]  # fmt: skip
        made.values = values
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Far({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {}, Counter())


class Elsewhere(TorchDispatchMode):
    """Computes on the device; `waits` is what its host waited for, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {}, self.waits)


class Sown(TorchFunctionMode):
    """Refuses a generator of one place for a tensor of the other; below it has no place."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        rng = named.get("generator")
        if isinstance(rng, torch.Generator):
            own = next((t.device for t in args if isinstance(t, Tensor)), "cpu")
            place = torch.device(named.get("device") or own)
            if rng.device.type != place.type:
                raise RuntimeError(
                    f"{func.__name__}: a generator of {rng.device} for a tensor of {place}"
                )
        if func is Tensor.tolist and isinstance(args[0], Far):  # which torch refuses
            self.waits["aten._to_copy"] += 1
            return args[0].values.tolist()
        return func(*args, **named)


class FarGenerator(torch.Generator):
    """A generator that says where it is; its numbers are those of the CPU's."""

    place: torch.device

    def __new__(cls, device: Any = "cpu") -> "FarGenerator":
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


def computed(func: Any, args: Any, kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    """An operation on the values, given back to where its arguments are."""
    name = str(func._overloadpacket)
    given = [*tree_leaves(args), *tree_leaves(kwargs)]
    if name in INDEXED:  # which may be by tensors of the CPU: the device takes a copy
        given = [g for at, arg in enumerate(args) if at != 1 for g in tree_leaves(arg)]
    ours = [t for t in given if isinstance(t, Far)]
    theirs = [t for t in given if isinstance(t, Tensor) and not isinstance(t, Far)]
    place = torch.device(kwargs.get("device") or (DEVICE if ours else "cpu"))
    moves = name in ("aten._to_copy", "aten.copy_")
    if ours and not moves and any(t.ndim for t in theirs):
        raise RuntimeError(f"{name}: tensors of {DEVICE} and of the CPU: {shapes(given)}")
    if ours and waits_for(name, args, place):
        waits[name] += 1
    near = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") else kwargs
    values = func(*tree_map(value_of, args), **tree_map(value_of, near))
    if name == "aten.copy_":
        return args[0]
    if place.type != DEVICE.type:
        return values
    results = tree_map(lambda t: Far(t) if isinstance(t, Tensor) else t, values)
    if not ours or name == "aten._to_copy":
        return results
    return return_and_correct_aliasing(func, args, kwargs, results)


def waits_for(name: str, args: Any, place: torch.device) -> bool:
    if name == "aten._to_copy":
        return place.type == "cpu" and isinstance(args[0], Far)
    if name == "aten.copy_":
        return not isinstance(args[0], Far) and isinstance(args[1], Far)
    if name in INDEXED:
        by = [t for t in args[1] if t is not None]
        return any(not isinstance(t, Far) or t.dtype in (torch.bool, torch.uint8) for t in by)
    return name in WAITS


def value_of(value: Any) -> Any:
    return value.values if isinstance(value, Far) else value


def shapes(given: list[Any]) -> str:
    tensors = [t for t in given if isinstance(t, Tensor)]
    return ", ".join(f"{list(t.shape)} on {t.device.type}" for t in tensors)


def moved(value: Any) -> Any:
    """A tensor on the device; of a module or another object its own tensors, in place."""
    _move(value, set())
    return Far(value) if isinstance(value, Tensor) else value


def _move(owner: Any, visited: set[int]) -> None:
    """All tensors that an object of jemkit's, or of a test's, holds in its fields."""
    if id(owner) in visited or isinstance(owner, Tensor | torch.Generator):
        return
    visited.add(id(owner))
    if isinstance(owner, list | dict):
        items = list(owner.items() if isinstance(owner, dict) else enumerate(owner))
    else:
        names = [*getattr(owner, "__dict__", {}), *getattr(type(owner), "__slots__", ())]
        items = [(n, getattr(owner, n)) for n in names if hasattr(owner, n)]
    for name, value in items:
        if isinstance(value, Tensor) and not isinstance(value, Far):
            _put(owner, name, _far(value))
        elif isinstance(value, list | dict | nn.Module) or _ours(value):
            _move(value, visited)


def _far(t: Tensor) -> Tensor:
    far = Far(t.detach())
    return nn.Parameter(far, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else far


def _put(owner: Any, name: Any, value: Tensor) -> None:
    if isinstance(owner, list | dict):
        owner[name] = value
    else:
        object.__setattr__(owner, name, value)


def _ours(value: Any) -> bool:
    return type(value).__module__.partition(".")[0].startswith(("jemkit", "test", "toys"))


@contextmanager
def elsewhere() -> Iterator[Elsewhere]:
    """A block whose generators may be of the device, too."""
    known = [m for name, m in sys.modules.items() if name.startswith("jemkit")]
    takers = [m for m in known if getattr(m, "Generator", None) is torch.Generator]
    autocast: Callable[..., Any] = torch.autocast
    for module in takers:
        module.Generator = FarGenerator  # type: ignore[attr-defined]
    torch.autocast = lambda kind, *given, **named: autocast(  # type: ignore[misc, assignment]
        "cpu" if kind == DEVICE.type else kind, *given, **named
    )
    try:
        with Elsewhere() as mode, Sown(mode.waits):
            yield mode
    finally:
        torch.autocast = autocast  # type: ignore[misc, assignment]
        for module in takers:
            module.Generator = torch.Generator  # type: ignore[attr-defined]
