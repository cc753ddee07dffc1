"""Finds the state dict in the contents of a file, by its names, however it is nested."""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from jemkit.errors import DataError
from jemkit.runtime.pytree import same
from jemkit.training.pretrained.layouts import MARKER, TOPS, Format, looks_like

WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
"""Prefixes that DataParallel, torch.compile and FSDP insert into names."""

AVERAGED = re.compile(r"(^|[^a-z])(ema|average|averaged|avg|swa)([^a-z]|$)")
MOST = 1_000_000
"""Limit on values; a checkpoint of a WideResNet with its optimizer has about 500."""

DEEPEST = 20
"""Limit on levels of containers, and on the parts of a name before the network's own."""

MANY = 50
"""Limit on state dicts of one file that are compared with each other."""


class StateDict(NamedTuple):
    """Weights that match a layout, and where they are."""

    key: str  # their common prefix; empty if the file contains nothing else
    weights: dict[str, Tensor]  # by the authors' names
    beside: Sequence[str] = ()  # other contents of the file, such as a replay buffer
    averaged: str = ""  # the plain weights to which it was preferred
    file: str = ""
    sha256: str = ""  # of the file


def state_dict_in(loaded: Any, format: Format | None = None, key: str | None = None) -> StateDict:
    """The only state dict of a known layout in the loaded object; `key` selects among several.

    Averaged weights (EMA, SWA) are preferred to the plain ones beside them.
    """
    values = _unwrapped(_named_values(loaded))
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not tensors:
        raise DataError(
            f"it contains no weights: {_kinds(loaded)}; expected a state_dict of names and tensors"
        )
    candidates = _candidates(tensors)
    if format is not None:
        candidates = [c for c in candidates if format in looks_like(c.weights)] or candidates
    if key is not None:
        candidates = _keyed(candidates, key)
    if not candidates:
        return StateDict("", tensors)  # an error lists its names
    selected, averaged = _select(candidates)
    return selected._replace(beside=_beside(values, selected), averaged=averaged)


def state_dict_by(loaded: Any, names: Collection[str], key: str | None = None) -> StateDict:
    """The only state dict with exactly these names, or the one that has most of them.

    Wrappers such as DataParallel do not count in a name; averaged weights are preferred.
    """
    tensors = {n: v for n, v in _named_values(loaded).items() if isinstance(v, Tensor)}
    if not tensors:
        raise DataError(
            f"it contains no weights: {_kinds(loaded)}; expected a state_dict of names and tensors"
        )
    own = {_bare(name): name for name in names}
    under: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for prefix in ("", *(f"{above}." for above in _above(name))):
            inner = _bare(name.removeprefix(prefix))
            under.setdefault(prefix, {})[own.get(inner, inner)] = tensor
    states = [StateDict(prefix.rstrip("."), weights) for prefix, weights in under.items()]
    if key is not None:
        states = _keyed(states, key)
    exact = [state for state in states if set(names) == set(state.weights)]
    if exact:
        selected, averaged = _select(exact)
        return selected._replace(averaged=averaged)
    return max(states, key=lambda state: len(set(names) & set(state.weights)))


def _bare(name: str) -> str:
    """A name without the parts that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _named_values(loaded: Any) -> dict[str, Any]:
    """Every value that is not a container, by its dotted name; endless nesting is rejected."""
    values: dict[str, Any] = {}
    stack: list[tuple[tuple[str, ...], Any]] = [((), loaded)]
    visited = 0
    while stack:
        path, value = stack.pop()
        visited += 1
        if visited > MOST:
            raise DataError(f"it contains more than {MOST:,} values; this is not a checkpoint")
        if isinstance(value, Mapping | list | tuple) and len(path) < DEEPEST:
            items = [*(value.items() if isinstance(value, Mapping) else enumerate(value))]
            stack += [((*path, str(name)), below) for name, below in reversed(items)]
        elif (name := ".".join(path)) in values:
            raise DataError(f"it contains two values of the name {name}")
        else:
            values[name] = value
    return values


def _unwrapped(values: dict[str, Any]) -> dict[str, Any]:
    """The same without the prefixes of wrappers, as long as every value keeps a unique name."""
    bare = {_bare(name): value for name, value in values.items()}
    return bare if len(bare) == len(values) else values


def _candidates(tensors: Mapping[str, Tensor]) -> list[StateDict]:
    """Every prefix under which the names match a layout."""
    under: dict[str, dict[str, Tensor]] = {}
    for name in tensors:
        if f".{name}".endswith(f".{MARKER}"):
            prefix = name.removesuffix(MARKER)
            outer = prefix.removesuffix("f.") if f".{prefix}".endswith(".f.") else prefix
            under[outer] = {}
            if f"{outer}energy_output.weight" not in tensors:  # else a trunk alone is no classifier
                under[prefix] = {}
    for name, tensor in tensors.items():
        for prefix in ("", *(f"{above}." for above in _above(name))):
            if prefix in under:
                under[prefix][name.removeprefix(prefix)] = tensor
    states: dict[str, dict[str, Tensor]] = {}
    for prefix, below in under.items():
        tops = TOPS["jem" if "class_output.weight" in below else "wrn"]
        members = {name: t for name, t in below.items() if name.partition(".")[0] in tops}
        if looks_like(members):
            states[prefix] = members
    inner = {f"{prefix}f." for prefix in states}  # a JEM's trunk is not a separate classifier
    return [StateDict(p.rstrip("."), state) for p, state in states.items() if p not in inner]


def _above(name: str) -> list[str]:
    """The names of what contains a value, the outermost first."""
    parts = name.split(".", DEEPEST)[:-1]
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def _beside(values: Mapping[str, Any], selected: StateDict) -> list[str]:
    """The other contents, each by the shortest name that contains none of these weights."""
    prefix = f"{selected.key}." if selected.key else ""
    members = {f"{prefix}{name}" for name in selected.weights}
    holders = {above for name in members for above in _above(name)}
    others = (name for name in values if name not in members)
    return sorted({next((a for a in _above(n) if a not in holders), n) for n in others})


def _keyed(candidates: list[StateDict], key: str) -> list[StateDict]:
    wanted = ".".join(p for p in key.split(".") if p not in WRAPPERS)
    here = [c for c in candidates if c.key == wanted or c.key.startswith(f"{wanted}.")]
    if not here:
        there = ", ".join(map(_named, candidates)) or "none that is known"
        raise DataError(f"it contains no state dict under the key {key!r}. There are: {there}")
    return here


def _select(candidates: list[StateDict]) -> tuple[StateDict, str]:
    """The only one; of averaged and plain weights the averaged, with the name of the plain."""
    if len(candidates) > MANY:
        count = f"{len(candidates)} state dicts that fit"
        raise DataError(f"it contains {count}; select one by --key NAME")
    distinct: list[StateDict] = []
    for state in candidates:
        if not any(same(state.weights, other.weights) for other in distinct):
            distinct.append(state)
    if len(distinct) == 1:
        return distinct[0], ""
    averaged = [c for c in distinct if AVERAGED.search(c.key.lower())]
    if len(distinct) == 2 and len(averaged) == 1:
        (plain,) = (c for c in distinct if c is not averaged[0])
        return averaged[0], _named(plain)
    raise DataError(
        f"it contains {len(distinct)} state dicts that fit, and their values differ: "
        f"{', '.join(map(_named, distinct))}. Select one by --key NAME"
    )


def _named(state: StateDict) -> str:
    return state.key or "the names without a key"


def _kinds(loaded: Any) -> str:
    """What the file contains instead of weights."""
    if not isinstance(loaded, Mapping):
        return type(loaded).__name__
    kinds = [f"{name!r} is {type(value).__name__}" for name, value in islice(loaded.items(), 3)]
    return ", ".join(kinds) or "it is empty"
