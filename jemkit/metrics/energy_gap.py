"""Accuracy under attack, and the energy gaps of the attack (the paper's Table 1)."""

from typing import Annotated

import torch
from torch import Tensor

from jemkit.attacks.base import ModelAttack
from jemkit.attacks.pgd import PGD
from jemkit.attacks.pixel_model import PixelModel
from jemkit.data import Images
from jemkit.metrics.attack_runner import Attacked, attacked, robust_share
from jemkit.metrics.evaluator import Context, batches
from jemkit.metrics.figures import Figure, plain
from jemkit.options import Options, PartOf

PGD20 = PGD(steps=20)
"""The attack of every figure named pgd20: steps of a quarter of the radius, one random start."""


class Robustness(Options):
    """Accuracy under one attack, and its energy gaps."""

    attack: Annotated[ModelAttack, PartOf("attack")] = PGD20

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        result = attacked(subject, self.attack, data, ctx, "pgd")
        return [robust_share(result, ctx), *gaps(subject, result, data, ctx)]


def gaps(
    subject: PixelModel, attacked_images: Attacked, data: Images, ctx: Context
) -> list[Figure]:
    """Statistics of the energy differences between x~ and x, image by image."""
    clean, joint = energies(subject, data, ctx)
    adv, joint_adv = energies(subject, Images(attacked_images.x_adv, data.y), ctx)
    values = energy_gaps(clean, adv, joint, joint_adv)
    return [
        plain(name, value, len(clean), attacked_images.protocol) for name, value in values.items()
    ]


def energies(subject: PixelModel, data: Images, ctx: Context) -> tuple[Tensor, Tensor]:
    """E(x) and E(x, y) of every image, each [N], float64 on the CPU."""
    rows = []
    with torch.no_grad():
        for x, y in batches(data, ctx):
            scores = subject.scores(x)
            rows.append(torch.stack([scores.energy, scores.joint(y)]).double().cpu())
    marginal, joint = torch.cat(rows, dim=1)
    return marginal, joint


def energy_gaps(clean: Tensor, adv: Tensor, joint: Tensor, joint_adv: Tensor) -> dict[str, float]:
    """Statistics of the differences of E(x) and E(x, y), each [N], image by image.

    `gap_mean` and `gap_variance` are of |E(x~) - E(x)|; `gap_signed` is the mean without the
    absolute value, `gap_joint` that of E(x, y). `gap_relative` is the mean over the standard
    deviation of E(x), since the gap scales with the logits.
    """
    gap = (adv - clean).abs()
    return {
        "gap_mean": float(gap.mean()),
        "gap_variance": float(gap.var(correction=0)),
        "gap_signed": float((adv - clean).mean()),
        "gap_joint": float((joint_adv - joint).mean()),
        "gap_relative": float(gap.mean() / clean.std(correction=0)),
    }
