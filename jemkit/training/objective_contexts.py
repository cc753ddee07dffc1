"""Objectives whose phases run inside contexts: autocast, compiled gradients."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Generator

from jemkit.backbone import Backbone
from jemkit.data import Batch
from jemkit.objective import Objective, SetsChainSteps, StatefulObjective, Terms
from jemkit.sampling.compile import CompiledGradient
from jemkit.sampling.kernels import gradients_by

Around = Callable[[], AbstractContextManager[Any]]


class ObjectiveInContext:
    """An objective whose phases run inside contexts, which are entered each time."""

    def __init__(
        self, inner: Objective[Any], drawing: Around, losing: Around = nullcontext
    ) -> None:
        self.inner, self.drawing, self.losing = inner, drawing, losing
        self.needs_density = inner.needs_density
        if isinstance(inner, SetsChainSteps):
            self.sets_chain_steps = inner.sets_chain_steps
        if isinstance(inner, StatefulObjective):
            self.after, self.parameters = inner.after, inner.parameters
            self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Any:
        with self.drawing():
            return self.inner.draw(backbone, batch, rng)

    def loss(self, backbone: Backbone, batch: Batch, draws: Any) -> Terms:
        with self.losing():
            return self.inner.loss(backbone, batch, draws)


def compiled_chains(objective: Objective[Any], unit: CompiledGradient) -> ObjectiveInContext:
    """An objective whose chains use compiled gradients; its loss is unchanged."""
    return ObjectiveInContext(objective, partial(gradients_by, unit))


def in_bf16(objective: Objective[Any], device_type: str) -> ObjectiveInContext:
    """An objective whose passes run in bfloat16; energies and losses stay float32.

    Autocast is entered for every pass, since it caches casts of weights that SAM moves.
    """
    autocast = partial(torch.autocast, device_type, torch.bfloat16)
    return ObjectiveInContext(objective, autocast, autocast)
