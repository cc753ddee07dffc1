"""FSDP-sharded weights: each process stores a part of them (torch's FSDP2, fully_shard).

The weights of a block are gathered for each of its passes and freed afterwards, in a chain as in an
update. Gradients, which are averaged, momentum buffers and averages are sharded too.

Every function is the identity on tensors that are not sharded.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from jemkit.errors import ConfigError, MisfitError
from jemkit.runtime.modes import eval_mode

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(model: nn.Module, x: Tensor) -> None:
    """Shard the weights: this process keeps its part. All processes call it at once, with any x.

    A part of the model may still be called on its own, as PYLD's steps do.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(x.device.type, (dist.get_world_size(),))
    for unit in dict.fromkeys([*units(model), model]):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    with torch.no_grad(), eval_mode(model):
        model(x)  # torch takes the module that is called first as the root


def units(module: nn.Module, *, listed: bool = False) -> Iterator[nn.Module]:
    """What is gathered at once, inner modules first: blocks of lists, and all else by layer."""
    inside = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    if listed and not inside:
        yield from [module] if any(True for _ in module.parameters()) else []
        return
    for child in module.children():
        yield from units(child, listed=inside)
    if any(True for _ in module.parameters(recurse=False)):
        yield module


def check(
    model: nn.Module, network: nn.Module, *, by_stem: bool, compiled: bool = False,
    channels_last: str = "auto",
) -> None:  # fmt: skip
    """Reject options, and networks whose weights cannot be gathered block by block."""
    if compiled:
        raise ConfigError(
            "run.shard: FSDP-sharded weights cannot be part of a compiled graph; omit run.shard "
            "or run.compile"
        )
    if channels_last == "yes":
        raise ConfigError(
            "run.shard: FSDP-sharded weights are contiguous; set run.channels_last "
            'to "auto" or "no"'
        )
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    twice = sorted(set(names) - {name for name, _ in model.named_parameters()})
    if twice:
        raise MisfitError(
            f"run.shard: {twice[0]} is the weight of two layers, but each layer gathers its own "
            "weights; omit run.shard"
        )
    own = [name for name, _ in network.named_parameters(recurse=False)]
    if by_stem and own:
        raise MisfitError(
            f"run.shard: the network itself has the weight {own[0]}, which is not gathered by a "
            f"sampler that evaluates only the first layer; move it into a layer, or choose "
            f"another sampler, such as sgld"
        )


def is_sharded(t: Tensor) -> "TypeGuard[DTensor]":
    if type(t) in (Tensor, nn.Parameter):  # importing DTensor takes a second
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def fusable(parameters: Sequence[Tensor]) -> bool:
    """Whether an optimizer can use its fused kernel."""
    return parameters[0].is_cuda and not is_sharded(parameters[0])


def local(t: Tensor) -> Tensor:
    """This process's shard, which shares its memory; it may have no rows."""
    return t.to_local() if is_sharded(t) else t


def like(full: Tensor, t: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as t is."""
    if not is_sharded(t):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, t.device_mesh, t.placements, src_data_rank=None)


@torch.no_grad()
def fill(t: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into t, or this process's part of it into its shard."""
    local(t).copy_(local(like(full, t)))


def reshard_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's saved state with this process's part of every momentum buffer."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(is_sharded(p) for p in params):
        return state
    names = [i for group in state["param_groups"] for i in group["params"]]
    owner = dict(zip(names, params, strict=True))

    def part(value: Any, p: Tensor) -> Any:
        return like(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value

    saved = state["state"].items()
    parts = {i: {name: part(v, owner[i]) for name, v in own.items()} for i, own in saved}
    return {**state, "state": parts}


def whole(tree: Any, *, keep: bool = True) -> Any:
    """A state with every tensor whole; sharded ones on the host. All processes call it at once.

    A process with `keep` False takes part, but keeps only what is not sharded.
    """

    def gathered(value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_sharded(value):
            return value
        full: Tensor = value.full_tensor().detach()
        return full.cpu() if keep else None

    return tree_map(gathered, tree)


def total(values: Tensor, of: Sequence[Tensor]) -> Tensor:
    """The sum of values [N], one per tensor of `of`, over all processes that have a part of it."""
    parts = list(zip(values.unbind(), of, strict=True))
    sharded = [value for value, t in parts if is_sharded(t)]
    if not sharded:
        return values.sum()
    summed = torch.stack(sharded).sum()
    dist.all_reduce(summed)
    own = [value for value, t in parts if not is_sharded(t)]
    return summed + torch.stack(own).sum() if own else summed
