"""The schema of a run's saved state, checked before a run is resumed or evaluated.

Hashes verify that a checkpoint contains what was written; the schema, that a run wrote it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Generator, Tensor
from torch.optim import Optimizer

from jemkit.backbone import Backbone
from jemkit.config.recipe import Recipe
from jemkit.data import Loader
from jemkit.errors import DataError
from jemkit.updaters import EMA

LARGEST = 2**53
"""No count of a run is as large, and every smaller whole number is exact in a float."""

Count = Annotated[int, Field(ge=0, lt=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Tensors = dict[str, Tensor]


class Part(BaseModel):
    """A table of the state; keys of other versions of jemkit, or of plug-ins, are allowed."""

    model_config = ConfigDict(
        strict=True, extra="allow", arbitrary_types_allowed=True, allow_inf_nan=False
    )


class Epoch(Part):
    epoch: Annotated[Count, Field(ge=1)]
    step: Count
    accuracy: Share
    pgd10: Share
    seconds: Annotated[float, Field(ge=0)]


class Best(Part):
    epoch: Annotated[Count, Field(ge=1)]
    score: list[float] = Field(min_length=3, max_length=3)


class Attempt(Part):
    attempt: Annotated[Count, Field(ge=1)]
    of: Count
    signal: str
    what: str
    step: Count
    since: int
    to: Count
    remedy: Literal["rate", "steps", "penalty"]
    renewed: Count
    told: str = Field(alias="with")


class RunStatistics(Part):
    drifts: Tensors
    levels: dict[str, list[float]]


class RollbackPolicy(Part):
    tried: list[Attempt]
    vitals: RunStatistics


class Group(Part):
    lr: Annotated[float, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    params: list[Count]


class OptimizerState(Part):
    state: dict[Count, Tensors]
    param_groups: list[Group]


class Position(Part):
    step: Count
    order: Tensor
    rng: Tensor


class Own(Part):
    """The state of one process."""

    density: dict[str, Any] | None
    objective: dict[str, Any] | None
    rng: Tensor


class Weights(Part):
    """The parts of a state that are evaluated, and from which samples are drawn."""

    model: Tensors
    ema: Tensors | None
    density: dict[str, Any] | None
    ranks: list[Own] = []


class SavedRun(Own, Weights):
    device: str
    optimizer: OptimizerState
    updater: dict[str, Any] | None
    loader: Position
    micro_batch: Count = 0
    recompute: bool = False
    history: list[Epoch]
    best: Best | Annotated[dict[str, Any], Field(max_length=0)]
    seconds: Annotated[float, Field(ge=0)]
    care: RollbackPolicy | None = None


def weights_of(state: Mapping[str, Any], path: Path) -> tuple[Tensors, bool]:
    """The weights to evaluate, and whether they are averaged ones."""
    found = _validated(Weights, state, f"{path}: ")
    if found.ema is None:
        return found.model, False
    _same_tensors("ema", found.ema, found.model)
    return found.ema, True


class Resumable(Protocol):
    """The parts of a trainer that a saved state has to fit."""

    backbone: Backbone
    optimizer: Optimizer
    ema: EMA | None
    rng: Generator
    loader: Loader
    recipe: Recipe

    @property
    def total_steps(self) -> int: ...


def check(state: Mapping[str, Any], trainer: Resumable) -> None:
    """Reject a state that this run cannot have saved; the error says where it is wrong."""
    found = _validated(SavedRun, state)
    for where, value in _numbers(state, ""):
        if abs(value) >= LARGEST:
            raise _wrong(where, f"{str(value)[:40]} is larger than any count")
    model = trainer.backbone.model.state_dict()
    _same_tensors("model", found.model, model)
    if (found.ema is None) != (trainer.ema is None):
        raise _wrong(
            "ema", "it has an average of the weights and the recipe has none, or the reverse"
        )
    if found.ema is not None:
        _same_tensors("ema", found.ema, model)
    own = (("", found), *((f"ranks/{i}/", rank) for i, rank in enumerate(found.ranks)))
    for where, part in own:
        _same_kind(f"{where}rng", part.rng, trainer.rng.get_state())
    _check_optimizer(found.optimizer, trainer)
    _check_position(found.loader, trainer)
    _check_epochs(found, trainer)
    if found.care is not None:
        _check_care(found.care, trainer)


def _check_optimizer(found: OptimizerState, trainer: Resumable) -> None:
    groups = trainer.optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    known = [index for group in found.param_groups for index in group.params]
    if len(found.param_groups) != len(groups) or known != list(range(len(params))):
        raise _wrong("optimizer/param_groups", "it is not the model's list of parameters")
    kept = {"SGD": {"momentum_buffer"}, "Adam": ADAM, "AdamW": ADAM}
    names = kept.get(type(trainer.optimizer).__name__)
    for index, tensors in found.state.items():
        where = f"optimizer/state/{index}"
        if index >= len(params):
            raise _wrong(where, f"there are {len(params)} parameters")
        if tensors and names is not None and set(tensors) != names:
            raise _wrong(where, f"it contains {sorted(tensors)}, expected {sorted(names)}")
        for name, tensor in tensors.items():
            if name == "step":
                _same_kind(f"{where}/step", tensor, torch.zeros((), dtype=torch.float32))
                if not 0 <= float(tensor) < LARGEST:
                    raise _wrong(f"{where}/step", f"{float(tensor)} is not a count of steps")
            else:
                _same_kind(f"{where}/{name}", tensor, params[index])


ADAM = {"step", "exp_avg", "exp_avg_sq"}


def _check_position(found: Position, trainer: Resumable) -> None:
    loader = trainer.loader
    if found.step > trainer.total_steps:
        raise _wrong("loader/step", f"{found.step} of {trainer.total_steps} steps")
    _same_kind("loader/rng", found.rng, loader.rng.get_state())
    n = len(loader.images.y) if found.step else 0
    if found.order.dtype != torch.int64 or found.order.shape != (n,):
        raise _wrong("loader/order", f"it is {_looks(found.order)}, expected {n} whole numbers")
    if not torch.equal(found.order.cpu().sort().values, torch.arange(n)):
        raise _wrong("loader/order", f"it is not a permutation of {n} images")


def _check_epochs(found: SavedRun, trainer: Resumable) -> None:
    """Every finished epoch is in the history; the last one may have been interrupted."""
    step, per_epoch = found.loader.step, trainer.loader.steps_per_epoch
    ended, begun_anew = divmod(step, per_epoch)
    for at, entry in enumerate(found.history):
        if (entry.epoch, entry.step) != (at + 1, (at + 1) * per_epoch):
            raise _wrong(f"history/{at}", f"epoch {entry.epoch} at step {entry.step}")
    if len(found.history) not in ({ended} if begun_anew else {ended, max(0, ended - 1)}):
        raise _wrong("history", f"{len(found.history)} epochs at step {step}")
    if isinstance(found.best, Best) and found.best.epoch * per_epoch > trainer.total_steps:
        raise _wrong("best/epoch", f"{found.best.epoch} is none of the run's")
    if step == trainer.total_steps and found.history and not isinstance(found.best, Best):
        raise _wrong("best", "a complete run has a best epoch")


def _check_care(found: RollbackPolicy, trainer: Resumable) -> None:
    options = trainer.recipe.sentinel
    if len(found.tried) > options.tries:
        raise _wrong("care/tried", f"{len(found.tried)} attempts of {options.tries}")
    for at, entry in enumerate(found.tried):
        if entry.attempt != at + 1:
            raise _wrong(f"care/tried/{at}/attempt", f"{entry.attempt} in place of {at + 1}")
    for name, drift in found.vitals.drifts.items():
        where = f"care/vitals/drifts/{name}"
        if drift.dtype != torch.float64 or drift.ndim != 1 or not 4 <= len(drift) <= LONGEST:
            raise _wrong(where, f"it is {_looks(drift)}")
        counts = drift[2:4]
        if not drift[2:].isfinite().all() or (counts < 0).any() or (counts > LARGEST).any():
            raise _wrong(where, "it contains something other than numbers")


LONGEST = 4 + 10**6
"""The numbers of a drift: its own four, and a window of metrics."""


def _validated(kind: type[Any], state: Mapping[str, Any], source: str = "") -> Any:
    try:
        return kind.model_validate(dict(state))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "/".join(map(str, first["loc"]))
        raise DataError(f"{source}{_wrong(where, first['msg'])}") from None


def _wrong(where: str, why: str) -> DataError:
    return DataError(f"the saved state is wrong at {where}: {why}")


def _same_tensors(where: str, found: Tensors, wanted: Mapping[str, Tensor]) -> None:
    """Names and shapes of the model are checked by its loader, all at once."""
    for name, tensor in found.items():
        if name in wanted and (where != "model" or tensor.dtype != wanted[name].dtype):
            _same_kind(f"{where}/{name}", tensor, wanted[name])
    if where != "model" and found.keys() != wanted.keys():
        raise _wrong(where, "its names are not the model's")


def _same_kind(where: str, found: Tensor, wanted: Tensor) -> None:
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        raise _wrong(where, f"it is {_looks(found)}, expected {_looks(wanted)}")


def _looks(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _numbers(tree: Any, where: str) -> Iterator[tuple[str, int]]:
    """Every whole number in a tree, with its path."""
    if isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in items:
            yield from _numbers(value, f"{where}/{key}" if where else str(key))
    elif isinstance(tree, int):
        yield where, tree
