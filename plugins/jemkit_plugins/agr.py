"""AGR (Li et al., ACM MM 2024): combines the gradient with that of clean images, per tensor."""

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from jemkit import (
    Backbone, Batch, Guard, MisfitError, Options, PartOf, Plain, Terms, Updater, UpdaterSpec,
    backward, frozen_batch_stats, hookimpl, soft_labels,
)  # fmt: skip
from jemkit.runtime import fsdp
from jemkit.updaters import Stateful, StepAware


class AGR(Options):
    """From `start` on, combines the gradient g1 of each tensor with g2, that of the clean loss.

    The clean loss is the cross-entropy. With c = cos(g1, g2), the result is g1 without its
    component along g2 if c <= 0, else c g2 + (1 - c) g1. The norm of each tensor's gradient is then
    limited to `clip`. Until `start` only `update` acts, which computes g1; with AWP g1 is the
    gradient at the perturbed weights, and g2 at the weights themselves.
    """

    start: float = Field(0.775, ge=0, le=1)  # fraction of the run: 155 of 200 epochs
    clip: float = Field(0.1, gt=0)  # limit of the norm of each tensor's gradient
    update: Annotated[UpdaterSpec, PartOf("updater")] = Plain()  # the updater that computes g1

    def unused(self) -> dict[str, str]:
        return {"clip": "where start is 1"} if self.start == 1 else {}

    def build(self, model: nn.Module, optimizer: Optimizer) -> Updater:
        return AGRUpdater(model, optimizer, self)


class AGRUpdater:
    """Gets the batch from `begin`, to compute its clean cross-entropy."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, options: AGR) -> None:
        if fsdp.is_sharded(next(model.parameters())):
            raise MisfitError(
                "run.shard: the updater agr compares whole gradients, which no process has; omit "
                "--shard, or use another updater"
            )
        self.model, self.optimizer, self.options = model, optimizer, options
        self.inner = options.update.build(model, optimizer)
        if isinstance(self.inner, Stateful):
            raise MisfitError(
                f"updater.update: {type(self.inner).__name__} keeps a state of its own, which agr "
                "does not save; choose plain, sam or awp"
            )
        self.total_steps = 0  # unknown: active from the first step on
        self.clean: Callable[[], Terms] | None = None

    def begin(self, backbone: Backbone, batch: Batch) -> None:
        def clean() -> Terms:
            with backbone.autocast():
                logits = backbone.model(batch.x).logits
            labels = batch.y if batch.mixed is None else soft_labels(batch, logits.shape[1])
            return Terms.weighted({"p(y|x)": (1.0, F.cross_entropy(logits, labels))})

        late = batch.step >= self.options.start * self.total_steps
        self.clean = clean if late else None
        if isinstance(self.inner, StepAware):
            self.inner.total_steps = self.total_steps
            self.inner.begin(backbone, batch)

    def step(self, terms: Callable[[], Terms], guard: Guard) -> None:
        if self.clean is None:
            self.inner.step(terms, guard)
            return
        with frozen_batch_stats(self.model):  # they are updated by the objective's passes
            backward(self.optimizer, self.clean)
        towards = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        self.inner.step(terms, Combining(guard, self, towards))


class Combining(Guard):
    """Combines the gradients of an update with those of the clean loss, then applies it."""

    def __init__(
        self, guard: Guard, agr: AGRUpdater, towards: Mapping[nn.Parameter, Tensor]
    ) -> None:
        super().__init__()
        self.guard, self.agr, self.towards = guard, agr, towards

    def update(self, optimizer: Optimizer, terms: Terms) -> None:
        for p in self.agr.model.parameters():
            if p.grad is not None:
                g2 = self.towards.get(p)
                combined = p.grad if g2 is None else surgery(p.grad, g2)
                p.grad = clipped(combined, self.agr.options.clip)
        self.guard.update(optimizer, terms)


def surgery(g1: Tensor, g2: Tensor) -> Tensor:
    """g1 and g2 combined by their angle; g1 if g2 is 0."""
    dot, size = (g1 * g2).sum(), g2.norm()
    c = dot / (g1.norm() * size + 1e-20)
    along = torch.where(size == 0, 0.0, dot / size.square())
    return torch.where(c <= 0, g1 - along * g2, c * g2 + (1 - c) * g1)


def clipped(g: Tensor, most: float) -> Tensor:
    """g, rescaled to the maximum norm if it is larger."""
    size = g.norm()
    return g * torch.where(size > most, most / size, 1.0)


@hookimpl
def jemkit_updaters() -> Mapping[str, type[UpdaterSpec]]:
    return {"agr": AGR}
