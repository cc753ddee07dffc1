"""Attacks that stop at an image's fall: whatever has fallen leaves the batch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from jemkit.errors import DataError
from jemkit.sampling import Sampler

FIRST = "the first that falls, else the last"
"""What such an attack keeps, for the protocol of its figures."""


def first_to_fall(
    subject: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Generator,
    *,
    starts: Iterable[Tensor],
    kernel: Callable[[Tensor], Sampler],
    steps: int,
) -> Tensor:
    """x~ [B, C, H, W]: of each row the first image that is wrong, else the last one seen.

    Rows climb the cross-entropy from each of `starts`, which are whole batches, so that the noise
    of a row does not depend on who still stands. `kernel` gives the step around some rows of x.
    """
    found, standing = x.clone(), torch.arange(len(x), device=x.device)
    for start in starts:
        rows, z = standing, start[standing]
        for step in range(steps + 1):
            if not len(rows):
                break
            seen: list[tuple[Tensor, Tensor]] = []

            def energy(z: Tensor, y: Tensor = y[rows], seen: list[Any] = seen) -> Tensor:
                logits = subject(z)
                loss = F.cross_entropy(logits, y, reduction="none")
                seen.append((loss.detach(), logits.argmax(1) == y))
                return -loss

            found[rows] = z
            if step < steps:
                z = kernel(x[rows]).step(energy, z, rng).detach()
            else:
                with torch.no_grad():
                    energy(z)
            ((loss, stand),) = seen
            if loss.isnan().any():
                raise DataError("the model's loss is NaN on attacked images: it has diverged")
            rows, z = rows[stand], z[stand]
        standing = rows
    return found
