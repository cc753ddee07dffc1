"""AWP (Wu et al., NeurIPS 2020): adversarial weight perturbation, an updater of any objective."""

from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from jemkit import (
    Backbone, Batch, Guard, Options, Terms, Updater, UpdaterSpec, backward, frozen_batch_stats,
    hookimpl, moved_weights,
)  # fmt: skip


class AWP(Options):
    """Perturbs each weight matrix by gamma times its norm to increase the loss, then updates there.

    The released code computes the perturbation with a proxy network and its own optimizer. One
    ascent step of the proxy, rescaled per layer, has this direction.
    """

    gamma: float = Field(0.01, ge=0)  # AT-AWP; TRADES-AWP uses 0.005
    start: float = Field(0.0, ge=0, le=1)  # share of the run; TRADES-AWP: 9 of 200 epochs

    def unused(self) -> dict[str, str]:
        reasons = {} if self.gamma else {"start": "where gamma is 0"}
        return reasons if self.start < 1 else {**reasons, "gamma": "where start is 1"}

    def build(self, model: nn.Module, optimizer: Optimizer) -> Updater:
        return AWPUpdater(model, optimizer, self)


class AWPUpdater:
    """Computes the update's gradient at the perturbed weights; only the model is perturbed."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, options: AWP) -> None:
        self.model, self.optimizer, self.options = model, optimizer, options
        self.total_steps, self.acts = 0, True

    def begin(self, backbone: Backbone, batch: Batch) -> None:
        self.acts = batch.step >= self.options.start * self.total_steps

    def step(self, terms: Callable[[], Terms], guard: Guard) -> None:
        evaluated = backward(self.optimizer, terms)
        if not self.acts:
            guard.update(self.optimizer, evaluated)
            return
        with moved_weights(self.ascent()), frozen_batch_stats(self.model):
            perturbed = backward(self.optimizer, terms)
        guard.update(self.optimizer, perturbed)

    def ascent(self) -> dict[nn.Parameter, Tensor]:
        """gamma |theta_l| g_l / |g_l| for every weight matrix; biases and norms are unchanged."""
        shifts = {}
        for p in self.model.parameters():
            if p.grad is None or p.ndim < 2:
                continue
            size = p.grad.float().norm()
            factor = torch.where(size == 0, 0.0, self.options.gamma * p.detach().norm() / size)
            shifts[p] = factor * p.grad
        return shifts


@hookimpl
def jemkit_updaters() -> Mapping[str, type[UpdaterSpec]]:
    return {"awp": AWP}
