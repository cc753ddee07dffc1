"""Energies of clean, attacked and generated images, and the gaps between them (Figure 1)."""

import hashlib
import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    Context, Evaluator, Figure, Images, Options, PixelModel, ball_of, batches, chain, hookimpl,
)  # fmt: skip
from jemkit.attacks.pgd import cross_entropy, negated
from jemkit.attacks.pixel_model import UNIT
from jemkit.metrics.attack_runner import attacked
from jemkit.metrics.energy_gap import PGD20, energies, energy_gaps
from jemkit.metrics.figures import BINS, bin_edges, histograms, plain, shares
from jemkit.runtime.rng import generator
from jemkit.sampling.density import together
from jemkit.sampling.fresh import in_batches
from jemkit.sampling.init_dists import start_name

SHORT = {"clean": "clean", "adversarial": "adv", "generated": "gen"}
"""The names of the sets in figures."""

QUANTILES = (0.1, 0.9)
"""Of E(x) at each state of the attack; the chart of its path shows the range between them."""

POINTS = 500
"""Number of images in the table of energy against confidence."""


class Energies(Options):
    """E(x) and E(x, y) of clean images, of images under PGD-20 and of new chains.

    Pairs of x and x~ give the gaps of the paper's Table 1. Any two sets give the overlap of their
    histograms and the Wasserstein-1 distance of their energies. E(x, y) uses the label of an image,
    and for a generated image its predicted class. A model without a density has no generated
    images. PGD-20 does not support L1, so in L1 only clean and generated images are compared.
    """

    runs_attacks: ClassVar[bool] = False  # those of --attack
    standard_at_any: ClassVar = frozenset({"path_images"})

    n: int | None = Field(None, ge=2)  # chains; None: 500, in a quick look 64
    steps: int = Field(40, ge=0)  # of each chain
    bins: int = Field(BINS, ge=2)  # of the histograms
    path_images: int = Field(256, ge=1)  # of the path of an attack

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        sets = {"clean": _Set.of(subject, data, ctx, {})}
        ctx.notes.rows["energy"] = sets["clean"].energy.float()
        figures: list[Figure] = []
        if ctx.threat.norm == "L1":
            ctx.notes.warnings.append(
                "energies: PGD-20 knows the norms Linf and L2, so no energies under attack in L1"
            )
        else:
            sets["adversarial"] = adv = _adversarial(subject, data, ctx)
            ctx.notes.rows["energy_adv"] = adv.energy.float()
            clean = sets["clean"]
            gaps = energy_gaps(clean.energy, adv.energy, clean.joint, adv.joint)
            card = {**ctx.card, **adv.card}
            figures = [plain(name, value, len(data.y), card) for name, value in gaps.items()]
            part = data.take(_spread(len(data.y), self.path_images))
            ctx.notes.tables["energy_path"] = energy_path(subject, part, ctx)
        if subject.has_density:
            sets["generated"] = self._generated(subject, ctx)
        ctx.notes.tables["energy_confidence"] = _confidence(subject, data, ctx)
        _note(sets, self.bins, ctx)
        return figures + _distances(sets, self.bins, ctx)

    def _generated(self, subject: PixelModel, ctx: Context) -> "_Set":
        """Final states of new chains, batch by batch, each batch from its own generator."""
        n = self.n or (64 if ctx.quick else 500)
        sizes = [min(ctx.batch_size, n - at) for at in range(0, n, ctx.batch_size)]
        side = together(subject.density, subject.model, sizes)

        def draw(rows: slice, rng: Generator) -> dict[str, Tensor]:
            return {"x": subject.sample(rows.stop - rows.start, rng, steps=self.steps).cpu()}

        card: dict[str, Any] = {"chains": n, "chain_steps": self.steps, "together": side}
        cache = ctx.result_cache({**card, **_origin(subject, ctx), "seed": ctx.seed})
        x = in_batches(
            sizes, draw, partial(generator, ctx.rng.device, ctx.seed, "energies"),
            cache=cache, poll=ctx.poll, done=lambda rows: ctx.progress("chains", rows, n),
        )["x"]  # fmt: skip
        broken = int((~x.isfinite()).flatten(1).any(1).sum())
        if broken:
            ctx.notes.warnings.append(
                f"energies: {broken} of {n} chains ended in NaN or inf; no figure is reported "
                f"for them"
            )
        unlabelled = Images(x, torch.zeros(n, dtype=torch.int64))
        with torch.no_grad():
            y = torch.cat([subject(part).argmax(1).cpu() for part, _ in batches(unlabelled, ctx)])
        card |= {"start": start_name(subject.density.start)}
        card |= {"sampler": repr(subject.density.sampler)}
        return _Set.of(subject, Images(x, y), ctx, card)


class _Set(NamedTuple):
    """The energies of a set of images, and the protocol of that set."""

    energy: Tensor  # [N], E(x), float64
    joint: Tensor  # [N], E(x, y)
    card: dict[str, Any]  # added to the context's

    @classmethod
    def of(cls, subject: PixelModel, data: Images, ctx: Context, card: dict[str, Any]) -> "_Set":
        return cls(*energies(subject, data, ctx), card)


def _adversarial(subject: PixelModel, data: Images, ctx: Context) -> _Set:
    result = attacked(subject, PGD20, data, ctx, "pgd")
    card = {k: v for k, v in result.protocol.items() if k not in (*ctx.card, "seconds")}
    return _Set.of(subject, Images(result.x_adv, data.y), ctx, card)


def _origin(subject: PixelModel, ctx: Context) -> dict[str, Any]:
    """Everything except seed and length that the result of a chain depends on."""
    density = subject.density
    first = density.start.draw(4, Generator(ctx.rng.device).manual_seed(0))
    return {
        **ctx.about_model(subject),
        "density": [type(density).__name__, repr(getattr(density, "options", None))],
        "sampler": repr(density.sampler),
        "start": hashlib.sha256(first.cpu().contiguous().numpy().data).hexdigest(),
    }


def energy_path(subject: PixelModel, data: Images, ctx: Context) -> dict[str, Any]:
    """E(x) and E(x, y) at each state of PGD-20: the random start and every step."""
    norm, rows = ball_of(ctx.threat, "pgd"), []
    for x, y in batches(data, ctx, "energy along the attack"):
        rng = Generator(ctx.rng.device).manual_seed(ctx.seed)
        kernel = PGD20.kernel(x, ctx.threat.radius_px, UNIT, norm)
        start, energy = PGD20.begin(kernel, rng), negated(cross_entropy(subject, y))
        states = [start, *chain(kernel, energy, start, rng, PGD20.steps)]
        with torch.no_grad():
            scores = [subject.scores(state) for state in states]
        pairs = [torch.stack([s.energy, s.joint(y)]) for s in scores]
        rows.append(torch.stack(pairs, dim=1).double().cpu())  # [2, steps + 1, B]
    energy, joint = torch.cat(rows, dim=2)
    low, high = energy.quantile(torch.tensor(QUANTILES, dtype=torch.float64), dim=1)
    return {
        "steps": list(range(PGD20.steps + 1)),
        "mean": energy.mean(1).tolist(),
        "joint": joint.mean(1).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "quantiles": list(QUANTILES),
        "n": len(data.y),
    }


def _confidence(subject: PixelModel, data: Images, ctx: Context) -> list[list[float]]:
    """[E(x), the largest p(y | x), whether it is correct] for some of the clean images."""
    points: list[list[float]] = []
    with torch.no_grad():
        for x, y in batches(data.take(_spread(len(data.y), POINTS)), ctx):
            scores = subject.scores(x)
            sure, label = scores.logits.softmax(1).max(1)
            points += torch.stack([scores.energy, sure, (label == y).float()], dim=1).tolist()
    return points


def _note(sets: Mapping[str, _Set], bins: int, ctx: Context) -> None:
    marginal = histograms({name: part.energy for name, part in sets.items()}, bins)
    joint = histograms({name: part.joint for name, part in sets.items()}, bins)
    ctx.notes.tables["energies"] = {**marginal, "joint": joint}


def _distances(sets: Mapping[str, _Set], bins: int, ctx: Context) -> list[Figure]:
    figures = []
    for a, b in itertools.combinations(sets, 2):
        one, two = sets[a], sets[b]
        least, pair = min(len(one.energy), len(two.energy)), f"{SHORT[a]}-{SHORT[b]}"
        pieces = {name: {"n": len(sets[name].energy), **sets[name].card} for name in (a, b)}
        card = {**ctx.card, "energy": "E(x)", "sets": pieces, "bins": bins}
        shared = overlap(one.energy, two.energy, bins)
        far = wasserstein(one.energy, two.energy)
        figures.append(plain(f"overlap/{pair}", shared, least, card))
        figures.append(plain(f"wasserstein/{pair}", far, least, card))
    return figures


def overlap(a: Tensor, b: Tensor, bins: int) -> float:
    """The overlap, 0 to 1, of histograms of a [N] and b [M] with bins over the range of both."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("nan")
    edges = bin_edges([a, b], bins)
    return float(torch.minimum(shares(a, edges), shares(b, edges)).sum())


def wasserstein(a: Tensor, b: Tensor) -> float:
    """The Wasserstein-1 distance of a [N] and b [M]: the area between their distributions."""
    sets = [a.double().sort().values, b.double().sort().values]
    points = torch.cat(sets).sort().values
    below = [torch.searchsorted(s, points[:-1], right=True).double() / len(s) for s in sets]
    return float(((below[0] - below[1]).abs() * points.diff()).sum())


def _spread(n: int, most: int) -> Tensor:
    """The indices of at most `most` of n images, evenly spaced in their order."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).round().long()


@hookimpl
def jemkit_evaluators() -> Mapping[str, type[Evaluator]]:
    return {"energies": Energies}
