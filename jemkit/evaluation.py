"""Evaluation: a model seen as a classifier of [0, 1] images, and what can be measured of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from jemkit.attack import PGD
from jemkit.data import Bounds, Images
from jemkit.energy import EnergyModel, Scores
from jemkit.modes import eval_mode, frozen
from jemkit.options import Options, Radius
from jemkit.sampling import Ball

UNIT = Bounds(0.0, 1.0)
"""The range in which whatever judges a model sees images."""


class PixelModel(nn.Module):
    """A module of [0, 1] images that returns logits; the scaling is inside."""

    def __init__(self, model: EnergyModel, bounds: Bounds) -> None:
        super().__init__()
        self.model, self.bounds = model, bounds

    def scores(self, pixels: Tensor) -> Scores:
        """Scores of images [B, C, H, W] in [0, 1]."""
        return self.model(self.bounds.from_unit(pixels))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.scores(pixels).logits


class Figure(NamedTuple):
    """One measured number, with an interval where one is defined, and how it was measured."""

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    protocol: dict[str, Any]


def _no_progress(*_: int) -> None:
    return None


@dataclass(frozen=True)
class Context:
    """What an evaluator works with beside its subject."""

    rng: Generator
    radius_px: float
    batch_size: int = 256
    card: dict[str, Any] = field(default_factory=dict)  # joins every figure's protocol
    progress: Callable[[int, int], None] = _no_progress


@runtime_checkable
class Evaluator(Protocol):
    """Measures a model on labelled images."""

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]: ...


def evaluate(
    subject: PixelModel, data: Images, evaluators: Sequence[Evaluator], ctx: Context
) -> list[Figure]:
    """Every evaluator's figures, of the subject in evaluation mode with frozen weights."""
    with frozen(subject), eval_mode(subject):
        return [figure for judge in evaluators for figure in judge(subject, data, ctx)]


class Accuracy(Options):
    """The share of images that are classified right, with its 95 % Wilson interval."""

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        right = 0
        for x, y in batches(data, ctx):
            with torch.no_grad():
                right += int((subject(x).argmax(1) == y).sum())
        return [share("clean", right, len(data.y), ctx.card)]


class Robustness(Options):
    """Accuracy under PGD, and how far apart the attack drives the energies (the paper's Table 1).

    `gap_mean` and `gap_variance` are of |E(x~) - E(x)|, image by image; `gap_signed` is without the
    bars, `gap_joint` of E(x, y); `gap_relative` is the mean over the standard deviation of E(x),
    since the gap scales with the logits. The radius is in 1/255 of the pixel range.
    """

    steps: int = Field(20, ge=1)
    radius_px: Radius | None = None
    norm: Ball = "Linf"

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        right, rows = 0, []
        for x, y in batches(data, ctx):
            x_adv = self.attacked(subject, x, y, ctx)
            with torch.no_grad():
                clean, adv = subject.scores(x), subject.scores(x_adv)
            right += int((adv.logits.argmax(1) == y).sum())
            rows.append(torch.stack([clean.energy, adv.energy, clean.joint(y), adv.joint(y)]))
        card = self.card(ctx)
        gaps = energy_gaps(*torch.cat(rows, dim=1).double())
        accuracy = share(f"pgd{self.steps}", right, len(data.y), card)
        return [accuracy, *(Figure(k, v, None, None, len(data.y), card) for k, v in gaps.items())]

    def attacked(self, subject: PixelModel, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        """x~ in [0, 1], by PGD on the cross-entropy."""

        def loss(pixels: Tensor) -> Tensor:
            return cross_entropy(subject(pixels), y)

        attack = PGD(steps=self.steps, radius_px=self.radius_px, norm=self.norm)
        return attack.draw(subject, loss, x, ctx.rng, bounds=UNIT, radius_px=ctx.radius_px)

    def card(self, ctx: Context) -> dict[str, Any]:
        """The protocol of every figure."""
        radius = ctx.radius_px if self.radius_px is None else self.radius_px
        return {
            **ctx.card,
            "attack": "pgd",
            "norm": self.norm,
            "radius_px": radius,
            "steps": self.steps,
            "step_px": radius / 4,
            "restarts": 1,
            "start": "uniform in the ball",
        }


def energy_gaps(clean: Tensor, adv: Tensor, joint: Tensor, joint_adv: Tensor) -> dict[str, float]:
    """Statistics of one-to-one differences of E(x) and E(x, y), each [N]."""
    gap = (adv - clean).abs()
    return {
        "gap_mean": float(gap.mean()),
        "gap_variance": float(gap.var(correction=0)),
        "gap_signed": float((adv - clean).mean()),
        "gap_joint": float((joint_adv - joint).mean()),
        "gap_relative": float(gap.mean() / clean.std(correction=0)),
    }


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Of each row, [B]."""
    return nn.functional.cross_entropy(logits, y, reduction="none")


def batches(data: Images, ctx: Context) -> Iterator[tuple[Tensor, Tensor]]:
    """[0, 1] images and labels, batch by batch, on the generator's device."""
    total = len(data.y)
    for at in range(0, total, ctx.batch_size):
        part = Images(data.x[at : at + ctx.batch_size], data.y[at : at + ctx.batch_size])
        part = part.to(ctx.rng.device)
        yield part.unit(), part.y
        ctx.progress(min(at + ctx.batch_size, total), total)


def share(name: str, right: int, n: int, protocol: dict[str, Any]) -> Figure:
    """A share with its 95 % Wilson interval."""
    z, p = 1.959964, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return Figure(name, p, max(0.0, middle - half), min(1.0, middle + half), n, protocol)
