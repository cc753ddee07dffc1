"""Gradient ascents that record every state, and transfer attacks from a surrogate."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from jemkit.attacks.base import Threat, ball_of
from jemkit.attacks.pgd import PGD, margin
from jemkit.attacks.pixel_model import UNIT
from jemkit.models.networks import MLP, seeded_init
from jemkit.sampling.kernels import perturbed, run

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps logits [B, K] and labels [B] to a loss [B]; higher is worse."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def lost_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The negative margin; it has no exponential that could underflow."""
    return -margin(logits, y)


class Ascent(NamedTuple):
    """Which images were misclassified at each state of an ascent, and its final state."""

    trail: Tensor  # [steps + 1, N], beginning with the start
    end: Tensor  # [N, C, H, W]

    @property
    def wrong(self) -> Tensor:
        """Misclassified at any state, [N]: the result of an attack that keeps the worst image."""
        return self.trail.any(dim=0)


def ascend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: int,
    loss: Loss = cross_entropy,
    step_px: float | None = None,
    start: Threat | None = None,
) -> Ascent:
    """PGD from a random point of the ball, or of the smaller ball `start`."""
    first = start or threat
    kernel = PGD(step_px=step_px).kernel(x, threat.radius_px, UNIT, ball_of(threat, "PGD"))
    z = kernel.project(perturbed(x, first.eps, rng, ball_of(first, "PGD")))
    trail = []

    def energy(z: Tensor) -> Tensor:
        logits = model(z)
        trail.append((logits.argmax(1) != y).detach())
        return -loss(logits, y)

    end = run(kernel, energy, z, rng, steps)
    with torch.no_grad():
        energy(end)
    return Ascent(torch.stack(trail), end)


def surrogate(
    model: nn.Module, images: Tensor, threat: Threat, rng: Generator, *, steps: int, batch: int
) -> nn.Module:
    """A perceptron that learns the model's predictions on noisy images (Papernot et al. 2017)."""
    with torch.no_grad():
        n_classes = model(images[:1]).shape[1]
    with seeded_init(rng):
        network = MLP(hidden=256, layers=2).build(tuple(images.shape[1:]))  # type: ignore[arg-type]
        student = nn.Sequential(network, nn.Linear(network.width, n_classes)).to(images.device)
    weights = list(student.parameters())
    optimizer = torch.optim.Adam(weights, lr=2e-3)
    width = max(threat.eps, 0.02) if threat.norm == "Linf" else 0.1
    for _ in range(steps):
        index = torch.randint(len(images), (batch,), generator=rng, device=images.device)
        x = UNIT.clamp(perturbed(images[index], 2 * width, rng))
        with torch.no_grad():
            pseudo_labels = model(x).argmax(1)
        loss = F.cross_entropy(student(x), pseudo_labels)
        for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = grad
        optimizer.step()
    return student.eval().requires_grad_(False)
