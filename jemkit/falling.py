"""Attacks that stop at an image's fall: whatever has fallen leaves the batch."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from jemkit.errors import DataError
from jemkit.sampling import Sampler
from jemkit.seeds import generator

if TYPE_CHECKING:
    from jemkit.attack import Perturb

FIRST = "the first that falls, else the last"
"""What such an attack keeps, for the protocol of its figures."""

GRAIN = 32
"""Images that a batch on a GPU shrinks by: cuDNN tries its convolutions anew for every size."""


def restarts(climb: "Perturb", label: str, n: int) -> dict[str, "Perturb"]:
    """A climb from n random starts as n stages, so that whatever stands one fills the next's
    batches."""
    if n == 1:
        return {label: climb}
    return {f"{label} restart {k}": partial(_restart, climb, k) for k in range(1, n + 1)}


def _restart(climb: "Perturb", k: int, x: Tensor, y: Tensor, rng: Generator) -> Tensor:
    """The k-th climb, from a stream of its own.

    Every batch begins from the seed, and survivors change rows: skipped draws of one stream might
    give an image the start again that it has withstood in another row.
    """
    if k > 1:
        drawn = torch.randint(2**62, (), generator=rng, device=rng.device)
        rng = generator(rng.device, int(drawn), f"restart {k}")
    return climb(x, y, rng)


def first_to_fall(
    subject: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Generator,
    *,
    start: Tensor,
    kernel: Callable[[Tensor], Sampler],
    steps: int,
    grain: int | None = None,
) -> Tensor:
    """x~ [B, C, H, W]: of each row the first image that is wrong, else the last one seen.

    Rows climb the cross-entropy from `start`; `kernel` gives the step around some rows of x. The
    batch shrinks to the rows that stand, in multiples of `grain`: None is `GRAIN` on a GPU, else 1.
    """
    grain = grain or (GRAIN if x.is_cuda else 1)
    found, z, rows = start.clone(), start, torch.arange(len(x), device=x.device)
    standing = torch.ones_like(rows, dtype=torch.bool)
    nan = torch.zeros((), dtype=torch.bool, device=x.device)
    for step in range(steps + 1):
        seen: list[tuple[Tensor, Tensor]] = []

        def energy(z: Tensor, y: Tensor = y[rows], seen: list[Any] = seen) -> Tensor:
            logits = subject(z)
            loss = F.cross_entropy(logits, y, reduction="none")
            seen.append((loss.detach(), logits.argmax(1) == y))
            return -loss

        found[rows] = z.where(_each(standing, z), found[rows])
        if step < steps:
            z = kernel(x[rows]).step(energy, z, rng).detach()
        else:
            with torch.no_grad():
                energy(z)
        ((loss, right),) = seen
        nan, standing = nan | loss.isnan().any(), standing & right
        on = _going_on(standing, grain)
        if len(on) < len(rows):
            rows, z, standing = rows[on], z[on], standing[on]
        if not len(rows):
            break
    if nan:
        raise DataError("the model's loss is NaN on attacked images: it has diverged")
    return found


def _going_on(standing: Tensor, grain: int) -> Tensor:
    """Places of the rows that stand, in order, and of others that fill the last `grain` up."""
    size = -(-int(standing.sum()) // grain) * grain
    return (~standing).long().argsort(stable=True)[:size]


def _each(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.ndim - 1))
