"""The reward of a strategy: the loss of its attacks, and accuracies after one step on them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from jemkit import (
    PGD, Backbone, Batch, Guard, Terms, UpdaterSpec, ce_adversary, eval_mode, frozen,
)  # fmt: skip
from jemkit.config.optim import SGD
from jemkit.runtime import distributed, fsdp, tensors
from jemkit_plugins.lasat.forms import Form

RESTARTS = 2
"""Steps of the PGD by which the model is evaluated after its step."""


class Unguarded(Guard):
    """Applies every update: weights are restored, and non-finite values are in the reward."""

    def update(self, optimizer: Optimizer, terms: Terms) -> None:
        optimizer.step()


@contextmanager
def restored(live: Sequence[Tensor], model: nn.Module | None = None) -> Iterator[None]:
    """Restore the tensors and the gradients of a model after the block."""
    params = [] if model is None else [*model.parameters()]
    before, grads = tensors.cloned(live), [p.grad for p in params]
    try:
        yield
    finally:
        tensors.copy(live, before)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        torch.clear_autocast_cache()


def reward(
    backbone: Backbone, batch: Batch, hardness: Tensor, terms: Callable[[], Terms], form: Form,
    update: UpdaterSpec, attack: PGD, lr: float, rng: Generator,
) -> Tensor:  # fmt: skip
    """R = min(hardness, cap) + accuracies after one step of the terms, weighted; a scalar."""
    model = backbone.model
    live = [fsdp.local(t.detach()) for t in (*model.parameters(), *model.buffers())]
    with restored(live, model):
        sgd = SGD(lr=lr, momentum=0, weight_decay=5e-4).build(model.parameters(), fused=False)
        update.build(model, sgd).step(terms, Unguarded())
        with frozen(model), eval_mode(model):
            clean = _right(backbone, batch.x, batch.y)
            tries = [ce_adversary(attack, backbone, batch.x, batch.y, rng) for _ in range(RESTARTS)]
            robust = torch.stack([_right(backbone, x, batch.y) for x in tries]).all(0)
    capped = hardness.clamp(0, form.cap)
    means = [capped, robust.float().mean(), clean.float().mean()]
    first, second, third = distributed.averages(means)
    return first + form.robust * second + form.clean * third


@torch.no_grad()
def _right(backbone: Backbone, x: Tensor, y: Tensor) -> Tensor:
    """Which images are classified correctly, [B]."""
    return backbone.model(x).logits.argmax(1) == y
