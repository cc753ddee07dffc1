"""Adversarial images by the attack that a strategy chose for each, and their loss."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from jemkit import PGD, Backbone, Batch, divergence, eval_mode, frozen, gradient
from jemkit.sampling.kernels import rowwise
from jemkit_plugins.lasat.forms import FormName

Chosen = dict[str, Tensor]
"""eps_px, iterations, step_px, and of "trades" beta; [B] each."""


def adversary(
    form: FormName, radius_px: float, most: int, backbone: Backbone, batch: Batch, chosen: Chosen,
    rng: Generator,
) -> Tensor:  # fmt: skip
    """x~ by PGD in eval mode, at most `most` steps; image i moves in its first iterations[i]."""
    x, bounds, model = batch.x, backbone.bounds, backbone.model
    trades = form == "trades"
    pgd = PGD(start="gaussian" if trades else "uniform")
    kernel = pgd.kernel(x, radius_px, bounds, "Linf")
    eps, size, steps = (rowwise(chosen[name], x) for name in ("eps_px", "step_px", "iterations"))
    limit, size = bounds.px(1.0) * eps, bounds.px(1.0) * size
    with frozen(model), eval_mode(model):
        clean = model(x).logits.detach() if trades else None

        def loss(z: Tensor) -> Tensor:
            logits = model(z).logits
            if clean is not None:
                return divergence(clean, logits)
            return F.cross_entropy(logits, batch.y, reduction="none")

        x_adv = pgd.begin(kernel, rng)
        for t in range(most):
            delta = x_adv + (t < steps) * size * gradient(loss, x_adv).sign() - x
            x_adv = bounds.clamp(x + delta.clamp(-limit, limit))
    return kernel.project(x_adv) if form == "awp" else x_adv


@torch.no_grad()
def hardness(backbone: Backbone, batch: Batch, x_adv: Tensor, beta: Tensor | None) -> Tensor:
    """The cross-entropy of x~ in eval mode, a scalar; with `beta`, the loss of TRADES."""
    model = backbone.model
    with eval_mode(model):
        adv = model(x_adv).logits
        if beta is None:
            return F.cross_entropy(adv, batch.y)
        clean = model(batch.x).logits
    return F.cross_entropy(clean, batch.y) + (beta * divergence(clean, adv)).mean()
