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
LONGEST = 4 + 10**6
"""The numbers of a drift: its own four, and a window of metrics."""
ADAM = {"step", "exp_avg", "exp_avg_sq"}

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
    continued_with: str = Field(alias="with")


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
    rollback: RollbackPolicy | None = Field(default=None, alias="care")


def weights_of(state: Mapping[str, Any], path: Path) -> tuple[Tensors, bool]:
    """The weights to evaluate, and whether they are averaged ones."""
    weights = _validated(Weights, state, f"{path}: ")
    if weights.ema is None:
        return weights.model, False
    _same_tensors("ema", weights.ema, weights.model)
    return weights.ema, True


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
    saved = _validated(SavedRun, state)
    for where, value in _numbers(state, ""):
        if abs(value) >= LARGEST:
            raise _wrong(where, f"{str(value)[:40]} is larger than any count")
    model = trainer.backbone.model.state_dict()
    _same_tensors("model", saved.model, model)
    if (saved.ema is None) != (trainer.ema is None):
        which = "it has an average of the weights and the recipe has none, or the reverse"
        raise _wrong("ema", which)
    if saved.ema is not None:
        _same_tensors("ema", saved.ema, model)
    for where, part in (("", saved), *((f"ranks/{i}/", r) for i, r in enumerate(saved.ranks))):
        _same_kind(f"{where}rng", part.rng, trainer.rng.get_state())
    _check_optimizer(saved.optimizer, trainer)
    _check_position(saved.loader, trainer)
    _check_epochs(saved, trainer)
    if saved.rollback is not None:
        _check_rollback(saved.rollback, trainer.recipe.sentinel.tries)


def _check_optimizer(saved: OptimizerState, trainer: Resumable) -> None:
    groups = trainer.optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    known = [index for group in saved.param_groups for index in group.params]
    if len(saved.param_groups) != len(groups) or known != list(range(len(params))):
        raise _wrong("optimizer/param_groups", "it is not the model's list of parameters")
    state_keys = {"SGD": {"momentum_buffer"}, "Adam": ADAM, "AdamW": ADAM}
    names = state_keys.get(type(trainer.optimizer).__name__)
    for index, tensors in saved.state.items():
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


def _check_position(saved: Position, trainer: Resumable) -> None:
    loader = trainer.loader
    if saved.step > trainer.total_steps:
        raise _wrong("loader/step", f"{saved.step} of {trainer.total_steps} steps")
    _same_kind("loader/rng", saved.rng, loader.rng.get_state())
    n = len(loader.images.y) if saved.step else 0
    if saved.order.dtype != torch.int64 or saved.order.shape != (n,):
        raise _wrong("loader/order", f"it is {_looks(saved.order)}, expected {n} whole numbers")
    if not torch.equal(saved.order.cpu().sort().values, torch.arange(n)):
        raise _wrong("loader/order", f"it is not a permutation of {n} images")


def _check_epochs(saved: SavedRun, trainer: Resumable) -> None:
    """Every finished epoch is in the history; the last one may have been interrupted."""
    step, per_epoch = saved.loader.step, trainer.loader.steps_per_epoch
    ended, remainder = divmod(step, per_epoch)
    for at, entry in enumerate(saved.history):
        if (entry.epoch, entry.step) != (at + 1, (at + 1) * per_epoch):
            raise _wrong(f"history/{at}", f"epoch {entry.epoch} at step {entry.step}")
    if len(saved.history) not in ({ended} if remainder else {ended, max(0, ended - 1)}):
        raise _wrong("history", f"{len(saved.history)} epochs at step {step}")
    if isinstance(saved.best, Best) and saved.best.epoch * per_epoch > trainer.total_steps:
        raise _wrong("best/epoch", f"{saved.best.epoch} is none of the run's")
    if step == trainer.total_steps and saved.history and not isinstance(saved.best, Best):
        raise _wrong("best", "a complete run has a best epoch")


def _check_rollback(saved: RollbackPolicy, tries: int) -> None:
    if len(saved.tried) > tries:
        raise _wrong("care/tried", f"{len(saved.tried)} attempts of {tries}")
    for at, entry in enumerate(saved.tried):
        if entry.attempt != at + 1:
            raise _wrong(f"care/tried/{at}/attempt", f"{entry.attempt} in place of {at + 1}")
    for name, drift in saved.vitals.drifts.items():
        where = f"care/vitals/drifts/{name}"
        if drift.dtype != torch.float64 or drift.ndim != 1 or not 4 <= len(drift) <= LONGEST:
            raise _wrong(where, f"it is {_looks(drift)}")
        counts = drift[2:4]
        if not drift[2:].isfinite().all() or (counts < 0).any() or (counts > LARGEST).any():
            raise _wrong(where, "it contains something other than numbers")


def _validated(kind: type[Any], state: Mapping[str, Any], source: str = "") -> Any:
    try:
        return kind.model_validate(dict(state))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "/".join(map(str, first["loc"]))
        raise DataError(f"{source}{_wrong(where, first['msg'])}") from None


def _wrong(where: str, why: str) -> DataError:
    return DataError(f"the saved state is wrong at {where}: {why}")


def _same_tensors(where: str, saved: Tensors, wanted: Mapping[str, Tensor]) -> None:
    """Names and shapes of the model are checked by its loader, all at once."""
    for name, tensor in saved.items():
        if name in wanted and (where != "model" or tensor.dtype != wanted[name].dtype):
            _same_kind(f"{where}/{name}", tensor, wanted[name])
    if where != "model" and saved.keys() != wanted.keys():
        raise _wrong(where, "its names are not the model's")


def _same_kind(where: str, saved: Tensor, wanted: Tensor) -> None:
    if saved.dtype != wanted.dtype or saved.shape != wanted.shape:
        raise _wrong(where, f"it is {_looks(saved)}, expected {_looks(wanted)}")


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
