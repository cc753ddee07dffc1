"""Finds the state dict in the contents of a file, by its names, however it is nested."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from jemkit.errors import DataError
from jemkit.runtime.pytree import same
from jemkit.training.pretrained.layouts import MARKER, Format, looks_like, top_names

WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
"""Prefixes that DataParallel, torch.compile and FSDP insert into names."""

COUNTERS = frozenset({"n_averaged"})
"""What torch's averaged models store beside the weights."""

AVERAGED = re.compile(r"(^|[^a-z])(ema|average|averaged|avg|swa)([^a-z]|$)")
MOST = 1_000_000
"""Limit on values; a checkpoint of a WideResNet with its optimizer has about 500."""

DEEPEST = 12
"""Limit on levels of containers; what is nested deeper is not weights."""

MOST_PARTS = 200
"""Limit on the parts of a name between its dots; those of networks have about ten."""

MANY = 50
"""Limit on state dicts of one file that are compared with each other."""

Path = tuple[str, ...]


class Leaf(NamedTuple):
    """A value of the file that is not a container."""

    path: Path  # its keys, split at their dots
    home: int  # the mapping or list that contains it
    tensor: Tensor | None


class StateDict(NamedTuple):
    """Weights that match a layout, and where they are."""

    key: str  # their common prefix; empty if the file contains nothing else
    weights: dict[str, Tensor]  # by the authors' names
    places: set[Path]  # of these tensors
    beside: Sequence[str] = ()  # other contents of the file, such as a replay buffer
    averaged: str = ""  # the plain weights to which it was preferred
    file: str = ""
    sha256: str = ""  # of the file


def state_dict_in(loaded: Any, format: Format | None = None, key: str | None = None) -> StateDict:
    """The only state dict of a known layout in the loaded object; `key` selects among several.

    Averaged weights (EMA, SWA) are preferred to the plain ones beside them.
    """
    leaves = _leaves(loaded)
    if not any(leaf.tensor is not None for leaf in leaves):
        raise DataError(
            f"it contains no weights: {_kinds(loaded)}; expected a state_dict of names and tensors"
        )
    leaves = _unwrapped(leaves)
    candidates = _candidates(leaves)
    if format is not None:
        candidates = [c for c in candidates if format in looks_like(c.weights)] or candidates
    if key is not None:
        candidates = _keyed(candidates, key)
    if not candidates:
        return _largest(leaves)
    selected, averaged = _select(candidates)
    return selected._replace(beside=_beside(leaves, selected.places), averaged=averaged)


def _leaves(loaded: Any) -> list[Leaf]:
    """Every value that is not a container, in order; endless nesting is rejected."""
    leaves: list[Leaf] = []
    stack: list[tuple[Path, int, Any]] = [((), 0, loaded)]
    homes = visited = 0
    while stack:
        path, home, value = stack.pop()
        visited += 1
        if len(path) > MOST_PARTS:
            what = f"a name in it has more than {MOST_PARTS} parts"
            raise DataError(f"{what}; this is not a checkpoint")
        if visited > MOST:
            raise DataError(f"it contains more than {MOST:,} values; this is not a checkpoint")
        if isinstance(value, Mapping | list | tuple) and len(path) < DEEPEST:
            homes += 1
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            below = [((*path, *str(k).split(".")), homes, v) for k, v in items]
            stack += reversed(below)
        else:
            leaves.append(Leaf(path, home, value if isinstance(value, Tensor) else None))
    return leaves


def _unwrapped(leaves: list[Leaf]) -> list[Leaf]:
    """The same without the prefixes of wrappers, as long as every tensor keeps a unique name."""
    bare = [leaf._replace(path=tuple(p for p in leaf.path if p not in WRAPPERS)) for leaf in leaves]
    names = [leaf.path for leaf in bare if leaf.tensor is not None]
    return bare if len(set(names)) == len(names) else leaves


def _candidates(leaves: list[Leaf]) -> list[StateDict]:
    """Every position whose names match a layout."""
    homes: dict[Path, int] = {}
    for leaf in leaves:
        if leaf.tensor is not None and leaf.path[-len(MARKER) :] == MARKER:
            base = leaf.path[: -len(MARKER)]
            homes.setdefault(base, leaf.home)
            if base and base[-1] == "f":
                homes.setdefault(base[:-1], leaf.home)
    names = {leaf.path for leaf in leaves}
    for base in [b for b in homes if b and b[-1] == "f"]:  # the trunk of a model with an energy
        if (*base[:-1], "energy_output", "weight") in names:
            del homes[base]
    under: dict[Path, list[Leaf]] = {base: [] for base in homes}
    for leaf in leaves:
        for depth in range(len(leaf.path)):
            if leaf.path[:depth] in under:
                under[leaf.path[:depth]].append(leaf)
    states = {
        base: read for base in homes if (read := _at(base, homes[base], under[base])) is not None
    }
    inner = {(*base, "f") for base in states}  # a JEM's trunk is not a separate classifier
    return [state for base, state in states.items() if base not in inner]


def _at(base: Path, home: int, under: list[Leaf]) -> StateDict | None:
    """The weights whose names follow `base`, if they match a layout."""
    tops = top_names([".".join(leaf.path[len(base) :]) for leaf in under])
    members: dict[str, Tensor] = {}
    paths: set[Path] = set()
    for leaf in under:
        rest = leaf.path[len(base) :]
        if leaf.tensor is None or (len(rest) == 1 and rest[0] in COUNTERS):
            continue
        if leaf.home == home or rest[0] in tops:
            members[".".join(rest)] = leaf.tensor
            paths.add(leaf.path)
    if not looks_like(members):
        return None
    return StateDict(".".join(base), members, paths)


def _beside(leaves: list[Leaf], members: set[Path]) -> list[str]:
    """The other contents, each by the shortest name that contains none of these members."""
    holders = {path[:depth] for path in members for depth in range(len(path))}
    names: dict[str, None] = {}
    for leaf in leaves:
        if leaf.path in members:
            continue
        outside = (leaf.path[:d] for d in range(1, len(leaf.path)) if leaf.path[:d] not in holders)
        names[".".join(next(outside, leaf.path))] = None
    return sorted(names)


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


def _largest(leaves: list[Leaf]) -> StateDict:
    """If no layout fits: the container with the most tensors, whose names the error lists."""
    homes: dict[int, dict[str, Tensor]] = {}
    for leaf in leaves:
        if leaf.tensor is not None:
            homes.setdefault(leaf.home, {})[".".join(leaf.path)] = leaf.tensor
    return StateDict("", max(homes.values(), key=len), set())


def _kinds(loaded: Any) -> str:
    """What the file contains instead of weights."""
    if not isinstance(loaded, Mapping):
        return type(loaded).__name__
    kinds = [f"{name!r} is {type(value).__name__}" for name, value in [*loaded.items()][:3]]
    more = [f"{len(loaded) - 3} more"] if len(loaded) > 3 else []
    return ", ".join([*kinds, *more]) or "it is empty"
