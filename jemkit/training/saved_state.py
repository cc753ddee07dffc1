"""The schema of a run's saved state, checked before a run is resumed or evaluated.

Hashes verify that a checkpoint contains what was written; the schema, that a run wrote it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.optim import Optimizer

from jemkit.data import Loader
from jemkit.errors import DataError

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
    what: str
    step: Count
    to: Count
    remedy: Literal["rate", "steps", "penalty"]
    continued_with: str = Field(alias="with")


class RunStatistics(Part):
    drifts: Tensors
    levels: dict[str, list[float]]


class RollbackPolicy(Part):
    tried: list[Attempt]
    vitals: RunStatistics


class Group(Part):
    """Settings of an optimizer, in the bounds of the recipe, which float32 can hold."""

    lr: Annotated[float, Field(ge=0, le=1e30)]
    weight_decay: Annotated[float, Field(ge=0, le=1e30)] = 0.0
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
    _check_average(weights)
    return (weights.model, False) if weights.ema is None else (weights.ema, True)


class Expected(NamedTuple):
    """What a run's state has to fit."""

    weights: Mapping[str, Tensor]
    average: bool  # whether the run averages its weights
    rng: Tensor
    optimizer: Optimizer
    loader: Loader
    total_steps: int
    tries: int  # of a rollback


def check(state: Mapping[str, Any], run: Expected) -> None:
    """Reject a state that this run cannot have saved; the error says where it is wrong.

    What the parts check themselves when they load it is left to them.
    """
    saved = _validated(SavedRun, state)
    _check_weights(saved, run)
    for where, part in (("", saved), *((f"ranks/{i}/", own) for i, own in enumerate(saved.ranks))):
        _same_kind(f"{where}rng", part.rng, run.rng)
    _check_optimizer(saved.optimizer, run.optimizer)
    _check_position(saved.loader, run.loader, run.total_steps)
    _check_epochs(saved, run.loader.steps_per_epoch, run.total_steps)
    if saved.rollback is not None:
        _check_rollback(saved.rollback, run.tries)


def _check_weights(saved: Weights, run: Expected) -> None:
    """Names and shapes of the model are left to its loader, which would cast another type."""
    for name in saved.model.keys() & run.weights.keys():
        if saved.model[name].dtype != run.weights[name].dtype:
            _same_kind(f"model/{name}", saved.model[name], run.weights[name])
    if (saved.ema is None) == run.average:
        raise _wrong("ema", "either the state or the recipe has an average of the weights")
    _check_average(saved)


def _check_average(saved: Weights) -> None:
    if saved.ema is None:
        return
    if saved.ema.keys() != saved.model.keys():
        raise _wrong("ema", "its names are not the model's")
    for name, tensor in saved.ema.items():
        _same_kind(f"ema/{name}", tensor, saved.model[name])


def _check_optimizer(saved: OptimizerState, optimizer: Optimizer) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    known = [index for group in saved.param_groups for index in group.params]
    if len(saved.param_groups) != len(optimizer.param_groups) or known != [*range(len(params))]:
        raise _wrong("optimizer/param_groups", "it is not the model's list of parameters")
    state_keys = {"SGD": {"momentum_buffer"}, "Adam": ADAM, "AdamW": ADAM}
    names = state_keys.get(type(optimizer).__name__)
    for index, tensors in saved.state.items():
        where = f"optimizer/state/{index}"
        if index >= len(params):
            raise _wrong(where, f"there are {len(params)} parameters")
        if tensors and names is not None and set(tensors) != names:
            raise _wrong(where, f"it contains {sorted(tensors)}, expected {sorted(names)}")
        for name, tensor in tensors.items():
            wanted = torch.zeros(()) if name == "step" else params[index]
            _same_kind(f"{where}/{name}", tensor, wanted)
            if name == "step" and not 0 <= float(tensor) < LARGEST:
                raise _wrong(f"{where}/step", f"{float(tensor)} is not a count of steps")


def _check_position(saved: Position, loader: Loader, total_steps: int) -> None:
    if saved.step > total_steps:
        raise _wrong("loader/step", f"{saved.step} of {total_steps} steps")
    _same_kind("loader/rng", saved.rng, loader.rng.get_state())
    n = len(loader.images.y) if saved.step else 0
    order = saved.order.cpu()
    if order.dtype != torch.int64 or not torch.equal(order.sort().values, torch.arange(n)):
        raise _wrong("loader/order", f"it is not a permutation of {n} images")


def _check_epochs(saved: SavedRun, per_epoch: int, total_steps: int) -> None:
    """Every finished epoch is in the history; the last one may have been interrupted."""
    step, epochs = saved.loader.step, [entry.epoch for entry in saved.history]
    ended, remainder = divmod(step, per_epoch)
    there = [*range(1, ended + 1)]
    if epochs != there and (remainder or epochs != there[:-1]):
        raise _wrong("history", f"epochs {epochs} at step {step}")
    if isinstance(saved.best, Best) and saved.best.epoch * per_epoch > total_steps:
        raise _wrong("best/epoch", f"{saved.best.epoch} is none of the run's")
    if step == total_steps and epochs and not isinstance(saved.best, Best):
        raise _wrong("best", "a complete run has a best epoch")


def _check_rollback(saved: RollbackPolicy, tries: int) -> None:
    if len(saved.tried) > tries:
        raise _wrong("care/tried", f"{len(saved.tried)} attempts of {tries}")
    for name, drift in saved.vitals.drifts.items():
        where = f"care/vitals/drifts/{name}"
        if drift.dtype != torch.float64 or drift.ndim != 1 or not 4 <= len(drift) <= LONGEST:
            raise _wrong(where, f"it is {_looks(drift)}")
        counts = drift[2:4]
        if not drift[2:].isfinite().all() or (counts < 0).any() or (counts > LARGEST).any():
            raise _wrong(where, "it contains something other than numbers")


def _same_kind(where: str, saved: Tensor, wanted: Tensor) -> None:
    if saved.dtype != wanted.dtype or saved.shape != wanted.shape:
        raise _wrong(where, f"it is {_looks(saved)}, expected {_looks(wanted)}")


def _looks(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _validated(kind: type[Any], state: Mapping[str, Any], source: str = "") -> Any:
    try:
        return kind.model_validate(dict(state))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "/".join(map(str, first["loc"]))
        raise DataError(f"{source}{_wrong(where, first['msg'])}") from None


def _wrong(where: str, why: str) -> DataError:
    return DataError(f"the saved state is wrong at {where}: {why}")
