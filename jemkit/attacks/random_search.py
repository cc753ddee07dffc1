"""An attack that asks for logits alone: random search over square windows."""

import torch
from torch import Generator, Tensor, nn

from jemkit.attacks.base import Threat


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """How far the label's logit leads the best other one, [B]; not above 0 where it is wrong."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    rest = logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)
    return own - rest


def random_search(
    subject: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator, queries: int
) -> Tensor:
    """x~ [B, C, H, W], the lowest margin in `queries` passes (after Andriushchenko et al. 2020).

    It begins with a sign for each column and channel. Windows of x~ - x are redrawn and kept where
    the margin falls; they shrink on the way. An image that is wrong is left as it is.
    """
    with torch.no_grad():
        columns = _signs((len(x), x.shape[1], 1, x.shape[3]), x, rng).expand(x.shape)
        best = (x + _to_surface(threat.eps * columns, threat)).clamp(0, 1)
        lead = margin(subject(best), y)
        for q in range(1, queries):
            live = (lead > 0).nonzero().squeeze(1)
            if not len(live):
                break
            delta = best[live] - x[live]
            trial = (x[live] + redrawn(delta, 1 - q / queries, threat, rng)).clamp(0, 1)
            margins = margin(subject(trial), y[live])
            better = margins < lead[live]
            best[live[better]], lead[live[better]] = trial[better], margins[better]
    return best


def redrawn(delta: Tensor, left: float, threat: Threat, rng: Generator) -> Tensor:
    """delta [B, C, H, W] with a window of one sign a channel; `left` is the share of queries left.

    The window takes 0.8 left^2 of the image, at least one pixel.
    """
    n, channels, height, width = delta.shape
    side = max(1, round(min(height, width) * (0.8 * left**2) ** 0.5))
    inside = _inside(n, height, side, delta, rng)[:, None, :, None]
    inside = inside & _inside(n, width, side, delta, rng)[:, None, None, :]
    signs = _signs((n, channels, 1, 1), delta, rng)
    power = {"Linf": 0.0, "L2": 0.5, "L1": 1.0}[threat.norm]
    size = threat.eps / (channels * side * side) ** power
    return _to_surface(torch.where(inside, size * signs, delta), threat)


def _inside(n: int, length: int, side: int, like: Tensor, rng: Generator) -> Tensor:
    """Which of `length` places a randomly placed window of `side` takes, [n, length]."""
    first = torch.randint(length - side + 1, (n, 1), generator=rng, device=like.device)
    place = torch.arange(length, device=like.device)
    return (place >= first) & (place < first + side)


def _signs(shape: tuple[int, ...], like: Tensor, rng: Generator) -> Tensor:
    return 2 * torch.randint(2, shape, generator=rng, device=like.device).to(like.dtype) - 1


def _to_surface(delta: Tensor, threat: Threat) -> Tensor:
    """delta scaled to the radius; in L-infinity every window has it already."""
    if threat.norm == "Linf":
        return delta
    power = 2.0 if threat.norm == "L2" else 1.0
    size: Tensor = torch.linalg.vector_norm(delta.flatten(1), power, dim=1)
    return delta * (threat.eps / size.clamp_min(1e-12)).view(-1, 1, 1, 1)
