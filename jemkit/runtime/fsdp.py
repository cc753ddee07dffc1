"""Weights in shares: each of several processes keeps a part of them (torch's FSDP2, fully_shard).

A block's weights are gathered for each of its passes and let go after it, in a chain as in an
update; gradients come back averaged, to each process those of its own part. So gradients, momenta
and averages lie in shares too. Every function is the identity on tensors that nobody shares.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from jemkit.errors import ConfigError, MisfitError
from jemkit.runtime.modes import eval_mode

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def shard(model: nn.Module, x: Tensor) -> None:
    """Leave this process its part of the weights; all of a group call it at once, with any x.

    The model may still be entered by a part of it, as PYLD's steps do.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(x.device.type, (dist.get_world_size(),))
    for unit in dict.fromkeys([*units(model), model]):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    with torch.no_grad(), eval_mode(model):
        model(x)  # torch takes the module that is called first for the whole


def units(module: nn.Module, *, listed: bool = False) -> Iterator[nn.Module]:
    """What is gathered at once, inner ones first: a list's blocks, and all else by layers."""
    inside = isinstance(module, LISTS)
    if listed and not inside:
        yield from [module] if any(True for _ in module.parameters()) else []
        return
    for child in module.children():
        yield from units(child, listed=inside)
    if any(True for _ in module.parameters(recurse=False)):
        yield module


def check(model: nn.Module, network: nn.Module, *, by_stem: bool) -> None:
    """Refuse a network whose weights cannot be gathered block by block."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    twice = sorted(set(names) - {name for name, _ in model.named_parameters()})
    if twice:
        raise MisfitError(
            f"run.shard: {twice[0]} is the weight of two layers, and each gathers its own; leave "
            "run.shard out"
        )
    own = [name for name, _ in network.named_parameters(recurse=False)]
    if by_stem and own:
        raise MisfitError(
            f"run.shard: the network itself holds {own[0]}, which a sampler that passes through "
            "its first layer alone would not gather; hold it in a layer, or choose another "
            "sampler, such as sgld"
        )


def check_options(*, compiled: bool, channels_last: str) -> None:
    """Refuse what torch cannot do with weights in shares."""
    if compiled:
        raise ConfigError(
            "run.shard: weights that are gathered for each pass cannot be part of a compiled "
            "graph; leave out one of run.shard and run.compile"
        )
    if channels_last == "yes":
        raise ConfigError(
            "run.shard: weights in shares are laid out as torch has them; set run.channels_last "
            'to "auto" or "no"'
        )


def is_shared(t: Tensor) -> "TypeGuard[DTensor]":
    """Whether other processes hold the rest of it."""
    if type(t) in (Tensor, nn.Parameter):  # DTensor takes a second to import
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def fusable(parameters: Sequence[Tensor]) -> bool:
    """Whether an optimizer's one kernel for all of them takes them: on a GPU, and nobody shares."""
    return parameters[0].is_cuda and not is_shared(parameters[0])


def local(t: Tensor) -> Tensor:
    """This process's part, which shares its memory; perhaps of no rows."""
    return t.to_local() if is_shared(t) else t


def like(full: Tensor, t: Tensor) -> Tensor:
    """This process's part of a whole tensor, laid out as t is."""
    if not is_shared(t):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, t.device_mesh, t.placements, src_data_rank=None)


@torch.no_grad()
def fill(t: Tensor, full: Tensor) -> None:
    """Write a whole tensor into t, or this process's part of it."""
    local(t).copy_(local(like(full, t)))


def reshard_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's saved state with this process's part of every momentum."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(is_shared(p) for p in params):
        return state
    names = [i for group in state["param_groups"] for i in group["params"]]
    owner = dict(zip(names, params, strict=True))
    parts = {
        i: {k: _momentum(v, owner[i]) for k, v in s.items()} for i, s in state["state"].items()
    }
    return {**state, "state": parts}


def _momentum(value: Any, p: Tensor) -> Any:
    return like(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value


def whole(tree: Any, *, keep: bool = True) -> Any:
    """A state with every tensor whole; shared ones on the host. All processes call it at once.

    Who does not `keep` it takes part, and gets what it has in common with the others.
    """
    if isinstance(tree, dict):
        return {k: whole(v, keep=keep) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [whole(v, keep=keep) for v in tree]
    if isinstance(tree, Tensor) and is_shared(tree):
        full: Tensor = tree.full_tensor().detach()
        return full.cpu() if keep else None
    return tree


def total(values: Tensor, of: Sequence[Tensor]) -> Tensor:
    """The sum of values [N], one a tensor of `of`, over all that hold a part of it."""
    parts = list(zip(values.unbind(), of, strict=True))
    shared = [value for value, t in parts if is_shared(t)]
    if not shared:
        return values.sum()
    found = torch.stack(shared).sum()
    dist.all_reduce(found)
    own = [value for value, t in parts if not is_shared(t)]
    return found + torch.stack(own).sum() if own else found
