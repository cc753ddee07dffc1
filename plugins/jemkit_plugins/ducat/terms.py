"""Terms of DUCAT's losses, from all 2K logits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def target(raw: Tensor, y: Tensor, dummy: float) -> Tensor:
    """Targets with 1 - b on class y and b on its dummy, [B, 2K]."""
    label = torch.zeros_like(raw).scatter(1, y[:, None], 1 - dummy)
    return label.scatter_add(1, y[:, None] + raw.shape[1] // 2, torch.full_like(raw[:, :1], dummy))


def margin(raw: Tensor, y: Tensor) -> Tensor:
    """-log(1 - q), q the largest probability of all 2K but y; a scalar."""
    p = raw.softmax(1)
    wrong = p.scatter(1, y[:, None], -1.0).argmax(1, keepdim=True)
    return -(1.0001 - p.gather(1, wrong).squeeze(1) + 1e-12).log().mean()


def disagreement(raw: Tensor, temperature: float) -> Tensor:
    """Jensen-Shannon divergence of the halves of a batch [2B, 2K], row by row; a scalar."""
    one, other = (raw / temperature).log_softmax(1).chunk(2)
    mean = torch.stack([one, other]).logsumexp(0) - math.log(2)
    each = (F.kl_div(mean, half, reduction="batchmean", log_target=True) for half in (one, other))
    return torch.stack([*each]).mean()
