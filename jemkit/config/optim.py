"""Optimizers by name, and learning rates as pure functions of the step."""

import inspect
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer

from jemkit.errors import ConfigError
from jemkit.options import Options

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


class SGD(Options):
    """Stochastic gradient descent with momentum."""

    use: Literal["sgd"] = "sgd"  # selects this optimizer
    lr: float = Field(0.1, gt=0, le=1e30)  # the learning rate, before the schedule's factor
    momentum: float = Field(0.9, ge=0, lt=1)  # share of the last update that is kept
    nesterov: bool = False  # whether it is Nesterov's momentum
    weight_decay: float = Field(5e-4, ge=0, le=1e30)  # factor of the weights in the gradient
    decay_norms: bool = True  # whether batch norm's weights and offsets decay too

    def unused(self) -> dict[str, str]:
        return {} if self.weight_decay else {"decay_norms": "where weight_decay is 0"}

    @model_validator(mode="after")
    def _momentum_to_look_ahead_by(self) -> "SGD":
        if self.nesterov and not self.momentum:
            raise ConfigError("optimizer.nesterov needs a momentum above 0")
        return self

    def build(self, params: Parameters, *, fused: bool) -> Optimizer:
        return without_dynamo(torch.optim.SGD)(
            params,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=fused or None,
        )


class Adam(Options):
    """Adam, or AdamW with decoupled weight decay."""

    use: Literal["adam", "adamw"] = "adam"  # adamw: decoupled weight decay
    lr: float = Field(1e-4, gt=0, le=1e30)  # the learning rate, before the schedule's factor
    betas: tuple[float, float] = (0.9, 0.999)  # decays of the means of g and of g squared
    weight_decay: float = Field(0.0, ge=0, le=1e30)  # factor of the weights in the gradient
    decay_norms: bool = True  # whether batch norm's weights and offsets decay too

    def unused(self) -> dict[str, str]:
        return {} if self.weight_decay else {"decay_norms": "where weight_decay is 0"}

    def build(self, params: Parameters, *, fused: bool) -> Optimizer:
        kind = torch.optim.AdamW if self.use == "adamw" else torch.optim.Adam
        return without_dynamo(kind)(
            params,
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=fused or None,
        )


def without_dynamo(kind: type[AnyOptimizer]) -> type[AnyOptimizer]:
    """The same optimizer, built without torch's wrapper that disables compilation.

    That wrapper imports the whole compiler when it is first called, which takes a second; jemkit
    compiles gradients alone, never an optimizer.
    """
    plain = inspect.unwrap(kind.add_param_group)
    return type(kind.__name__, (kind,), {"add_param_group": plain})


OptimizerOptions = Annotated[SGD | Adam, Field(discriminator="use")]


class Schedule(Options):
    """A factor on the learning rate: linear warm-up, then constant, steps or cosine decay.

    `onecycle` is PyTorch's OneCycleLR with its defaults, step by step: half a cosine from 1/25 up
    to 1 in the warm-up, another one down to 1/250,000, and the momentum of SGD from 0.95 to 0.85
    and back.

    Warm-up ends after `warmup` steps or `warmup_share` of the run, whichever comes first. Its first
    step has a rate above 0; in the released code the first step has rate 0.
    """

    # how the factor falls after warm-up
    decay: Literal["constant", "steps", "cosine", "onecycle"] = "steps"
    warmup: int = Field(1000, ge=0)  # steps of warm-up, at most
    warmup_share: float = Field(0.05, ge=0, le=1)  # warm-up's share of the run, at most
    at: tuple[float, ...] = (0.5, 0.75)  # of `steps`: shares of the run; jemkit's choice
    by: float = Field(0.2, gt=0, le=1)  # of `steps`: the factor at each
    floor: float = Field(0.0, ge=0, le=1)  # of `cosine`: the factor at the end

    def unused(self) -> dict[str, str]:
        reasons: dict[str, str] = {}
        if self.decay != "steps":
            reasons |= dict.fromkeys(("at", "by"), 'unless decay = "steps"')
        elif not self.at:
            reasons["by"] = "if at is empty"
        elif min(self.at) >= 1:
            reasons["at"] = "since shares of the run of 1 or more are never reached"
        if self.decay != "cosine":
            reasons["floor"] = 'unless decay = "cosine"'
        if not self.warmup:
            reasons["warmup_share"] = "if warmup is 0"
        elif not self.warmup_share:
            reasons["warmup"] = "if warmup_share is 0"
        return reasons

    def momentum(self, step: int, total: int) -> float | None:
        """The momentum at a step; None where it is the optimizer's own."""
        if self.decay != "onecycle":
            return None
        along, rising = self._cycle(step, total)
        return _between(0.95, 0.85, along) if rising else _between(0.85, 0.95, along)

    def _cycle(self, step: int, total: int) -> tuple[float, bool]:
        """How far along its half of the cycle a step is, and whether that is the first half."""
        top = max(0, min(self.warmup, math.ceil(self.warmup_share * total)) - 1)
        if step < top:
            return step / top, True
        return min(1.0, (step - top) / max(1, total - 1 - top)), False

    def factor(self, step: int, total: int) -> float:
        """The factor at `step` of 0, ..., total - 1."""
        if self.decay == "onecycle":
            along, rising = self._cycle(step, total)
            return _between(1 / 25, 1.0, along) if rising else _between(1.0, 1 / 25e4, along)
        warmup = min(self.warmup, math.ceil(self.warmup_share * total))
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if self.decay == "constant":
            return rise
        if self.decay == "steps":
            passed = sum(step >= share * total for share in self.at)
            return rise * math.pow(self.by, passed)
        along = min(1.0, max(0.0, (step - warmup) / max(1, total - warmup)))
        return rise * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * along)))


def _between(first: float, last: float, along: float) -> float:
    """Half a cosine from `first` to `last`."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * along))
