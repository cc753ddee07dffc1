"""Objectives whose phases run inside contexts: autocast, compiled gradients."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, nn

from jemkit.backbone import Backbone
from jemkit.data import Batch
from jemkit.objective import Objective, StatefulObjective, Terms
from jemkit.sampling.compile import CompiledGradient
from jemkit.sampling.kernels import gradients_by

Around = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class ObjectiveInContext:
    """An objective whose phases run inside contexts, which are entered each time."""

    inner: Objective[Any]
    drawing: Around
    losing: Around = nullcontext

    @property
    def needs_density(self) -> bool:
        return self.inner.needs_density

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Any:
        with self.drawing():
            return self.inner.draw(backbone, batch, rng)

    def loss(self, backbone: Backbone, batch: Batch, draws: Any) -> Terms:
        with self.losing():
            return self.inner.loss(backbone, batch, draws)

    def after(self, backbone: Backbone, batch: Batch, draws: Any, rng: Generator) -> None:
        if isinstance(self.inner, StatefulObjective):
            self.inner.after(backbone, batch, draws, rng)

    def parameters(self) -> list[nn.Parameter]:
        return self.inner.parameters() if isinstance(self.inner, StatefulObjective) else []

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict() if isinstance(self.inner, StatefulObjective) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self.inner, StatefulObjective):
            self.inner.load_state_dict(state)


def compiled_chains(objective: Objective[Any], unit: CompiledGradient) -> ObjectiveInContext:
    """An objective whose chains use compiled gradients; its loss is unchanged."""
    return ObjectiveInContext(objective, partial(gradients_by, unit))


def in_bf16(objective: Objective[Any], device_type: str) -> ObjectiveInContext:
    """An objective whose passes run in bfloat16; energies and losses stay float32.

    Autocast is entered for every pass, since it caches casts of weights that SAM moves.
    """
    autocast = partial(torch.autocast, device_type, torch.bfloat16)
    return ObjectiveInContext(objective, autocast, autocast)
