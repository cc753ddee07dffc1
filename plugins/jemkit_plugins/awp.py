"""AWP (Wu et al., NeurIPS 2020): adversarial weight perturbation, an updater of any objective."""

from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from jemkit import (
    Guard, Options, Terms, Updater, UpdaterSpec, backward, frozen_batch_stats, hookimpl,
    moved_weights,
)  # fmt: skip


class AWP(Options):
    """Perturbs each weight matrix by gamma times its norm to increase the loss, then updates there.

    The released code computes the perturbation with a proxy network and its own optimizer. One
    ascent step of the proxy, rescaled per layer, has this direction.
    """

    gamma: float = Field(0.01, ge=0)  # AT-AWP; TRADES-AWP uses 0.005

    def build(self, model: nn.Module, optimizer: Optimizer) -> Updater:
        return AWPUpdater(model, optimizer, self.gamma)


class AWPUpdater:
    """Computes the update's gradient at the perturbed weights; only the model is perturbed."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, gamma: float) -> None:
        self.model, self.optimizer, self.gamma = model, optimizer, gamma

    def step(self, terms: Callable[[], Terms], guard: Guard) -> None:
        backward(self.optimizer, terms)
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
            factor = torch.where(size == 0, 0.0, self.gamma * p.detach().norm() / size)
            shifts[p] = factor * p.grad
        return shifts


@hookimpl
def jemkit_updaters() -> Mapping[str, type[UpdaterSpec]]:
    return {"awp": AWP}
