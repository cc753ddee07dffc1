"""Out-of-distribution detection (Grathwohl et al., ICLR 2020): test images against other images."""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor

from jemkit import (
    Context, Dataset, Evaluator, Figure, Images, MisfitError, Options, PartOf, PixelModel,
    batches, gradient, hookimpl,
)  # fmt: skip
from jemkit.metrics.figures import Z, histograms
from jemkit.runtime.rng import generator
from jemkit.runtime.work_cache import tensors_hash

Made = Literal["interpolation", "uniform", "gaussian", "constant", "rotation"]
"""Image sets that need no files."""

SCORES = {
    "logp": "-E(x), log p(x) up to a constant",
    "softmax": "the largest p(y | x)",
    "gradnorm": "-|dE/dx|, the approximate mass; x in [0, 1]",
    "joint": "max over y of -E(x, y)",
}
"""The scores by name; larger means in-distribution."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue, for coloured images in a model of greyscale images."""


class OOD(Options):
    """How well each score separates test images (the positive class) from other images.

    By default the other sets are those that need no files (means of two test images, uniform and
    Gaussian noise, images of a single colour, and rotations by 90 degrees if images are greyscale),
    and other data sets whose files are in the same folder. `against` selects registered data sets
    instead: --set ood.against=[{use="svhn",dir="data"}]
    """

    runs_attacks: ClassVar[bool] = False  # those of --attack
    standard_at_any: ClassVar = frozenset({"made"})  # each set has its own figures

    made: tuple[Made, ...] | None = None  # None: all; rotation only for greyscale images
    against: tuple[Annotated[Dataset, PartOf("dataset")], ...] = ()  # data sets; (): the usual ones

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        inside = scores(subject, data, ctx, "test images")
        figures: list[Figure] = []
        table: dict[str, Any] = {}
        energies = {"test": -inside["logp"]}
        for name, x, how in self._sets(data.unit().cpu(), ctx):
            others = Images(x, torch.zeros(len(x), dtype=torch.int64))
            outside = scores(subject, others, ctx, f"out of distribution: {name}")
            card = {**ctx.card, **how, "positive": "test", "counts": [len(data.y), len(x)]}
            card["seed"] = ctx.seed
            detections = {score: detection(inside[score], outside[score]) for score in SCORES}
            table[name] = {s: {**d.values, "n": len(x)} for s, d in detections.items()}
            figures += [f for s, d in detections.items() for f in _figures(name, s, d, card)]
            energies[name] = -outside["logp"]
        ctx.notes.tables["ood"] = table
        ctx.notes.tables["ood_energies"] = histograms(energies)
        return figures

    def _sets(self, x: Tensor, ctx: Context) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Each set's name, its images [M, C, H, W] in [0, 1], and how they were made."""
        usual = [m for m in get_args(Made) if m != "rotation" or x.shape[1] == 1]
        for made in dict.fromkeys(usual if self.made is None else self.made):
            rng = generator(torch.device("cpu"), ctx.seed, "ood", made)
            how, make = MADE[made]
            yield made, make(x, rng), {"ood": made, "made": how}
        taken: dict[str, int] = {}
        others = {} if self.against else ctx.others()
        for dataset in self.against:
            word = type(dataset).__name__.lower()  # as registered
            taken[word] = taken.get(word, 0) + 1
            name = word if taken[word] == 1 else f"{word}{taken[word]}"
            others = {**others, name: dataset.load("test")}
        for name, images in others.items():
            rng = generator(torch.device("cpu"), ctx.seed, "ood", name)
            yield name, *_random_subset(images.x, name, x, rng)


def scores(subject: PixelModel, data: Images, ctx: Context, what: str = "") -> dict[str, Tensor]:
    """Every score of every image, each [N], float64 on the CPU; one forward, one backward pass."""
    rows = []
    for x, _ in batches(data, ctx, what):
        logp: list[Tensor] = []  # log p(y | x) and E(x) of the pass that gives the gradient

        def energy(z: Tensor, collected: list[Tensor] = logp) -> Tensor:
            scored = subject.scores(z)
            collected += [scored.logits.detach().log_softmax(1), scored.energy.detach()]
            return scored.energy

        slope = gradient(energy, x).flatten(1).norm(dim=1)
        best = logp[0].max(1).values
        rows.append(torch.stack([-logp[1], best.exp(), -slope, best - logp[1]]).double().cpu())
    return dict(zip(SCORES, torch.cat(rows, dim=1), strict=True))


class Detection(NamedTuple):
    """How well a score separates positives from negatives."""

    auroc: float
    low: float  # of the AUROC's 95 % interval (DeLong et al. 1988)
    high: float
    aupr: float
    fpr95: float

    @property
    def values(self) -> dict[str, float]:
        return {"auroc": self.auroc, "aupr": self.aupr, "fpr95": self.fpr95}


def detection(positive: Tensor, negative: Tensor) -> Detection:
    """The statistics of scores [N] and [M]; all NaN if a score is NaN."""
    if positive.isnan().any() or negative.isnan().any():
        return Detection(*[float("nan")] * 5)
    low, high = auroc_interval(positive, negative)
    rates = aupr(positive, negative), fpr_at(positive, negative, percent=95)
    return Detection(auroc(positive, negative), low, high, *rates)


def wins(a: Tensor, b: Tensor) -> Tensor:
    """For each a [N] the share of b [M] that is smaller; a tie counts half."""
    ordered = b.sort().values
    below = torch.searchsorted(ordered, a) + torch.searchsorted(ordered, a, right=True)
    return below.double() / (2 * len(b))


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The probability that a positive scores higher than a negative; ties count half."""
    return float(wins(positive, negative).mean())


def auroc_interval(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """The 95 % interval of the AUROC (DeLong et al. 1988); a single image has no spread."""
    if min(len(positive), len(negative)) < 2:
        return 0.0, 1.0
    area, variance = auroc(positive, negative), 0.0
    for one, two in ((positive, negative), (negative, positive)):
        variance += float(wins(one, two).var()) / len(one)
    half = Z * variance**0.5
    return max(0.0, area - half), min(1.0, area + half)


def aupr(positive: Tensor, negative: Tensor) -> float:
    """Average precision: the mean, over the positives, of the precision at each one's score."""
    true, false = (at_least(scores, positive) for scores in (positive, negative))
    return float((true / (true + false)).mean())


def fpr_at(positive: Tensor, negative: Tensor, *, percent: int) -> float:
    """The share of negatives accepted at the threshold that accepts `percent` of the positives."""
    let_in = -(-percent * len(positive) // 100)
    threshold = positive.sort(descending=True).values[let_in - 1 : let_in]
    return float(at_least(negative, threshold) / len(negative))


def at_least(scores: Tensor, thresholds: Tensor) -> Tensor:
    """How many of the scores [N] reach each threshold [M]."""
    return (len(scores) - torch.searchsorted(scores.sort().values, thresholds)).double()


def _figures(name: str, score: str, result: Detection, card: dict[str, Any]) -> list[Figure]:
    end = "" if score == "logp" else f"/{score}"
    n, card = card["counts"][0], {**card, "score": SCORES[score]}
    delong = {**card, "interval": "DeLong"}
    return [
        Figure(f"auroc/{name}{end}", result.auroc, result.low, result.high, n, delong),
        Figure(f"aupr/{name}{end}", result.aupr, None, None, n, card),
        Figure(f"fpr95/{name}{end}", result.fpr95, None, None, n, card),
    ]


def interpolation(x: Tensor, rng: Generator) -> Tensor:
    order = x[torch.randperm(len(x), generator=rng)]
    return (order + order.roll(1, 0)) / 2


def uniform(x: Tensor, rng: Generator) -> Tensor:
    return torch.rand(x.shape, generator=rng)


def gaussian(x: Tensor, rng: Generator) -> Tensor:
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return (mean + std * torch.randn(x.shape, generator=rng)).clamp(0, 1)


def constant(x: Tensor, rng: Generator) -> Tensor:
    return torch.rand((*x.shape[:2], 1, 1), generator=rng).expand(x.shape).contiguous()


def rotation(x: Tensor, _: Generator) -> Tensor:
    return x.rot90(1, (2, 3)).contiguous()


MADE: dict[str, tuple[str, Callable[[Tensor, Generator], Tensor]]] = {
    "interpolation": ("means of consecutive test images in a drawn order", interpolation),
    "uniform": ("each pixel uniform in [0, 1]", uniform),
    "gaussian": ("normal, mean and deviation of the test images' channels, clamped", gaussian),
    "constant": ("one uniformly drawn colour for each image", constant),
    "rotation": ("test images turned by 90 degrees", rotation),
}


def _random_subset(
    whole: Tensor, name: str, x: Tensor, rng: Generator
) -> tuple[Tensor, dict[str, Any]]:
    """At most as many test images of another data set as x has, with the channels of x."""
    if whole.shape[2:] != x.shape[2:]:
        raise MisfitError(
            f"ood: the images of {name} are {list(whole.shape[1:])}, the model's "
            f"{list(x.shape[1:])}; give ones of its size: a folder of images with size = "
            f"{x.shape[2]} in its table is resized"
        )
    indices = torch.randperm(len(whole), generator=rng)[: len(x)].sort().values
    others = Images(whole[indices], indices).unit().cpu()
    how = {
        "ood": name,
        "selection": f"{len(indices)} of {len(whole)} test images, by the seed",
        "ood_sha256": tensors_hash({"x": whole}),
    }
    if others.shape[1] == x.shape[1]:
        return others, how
    if x.shape[1] == 1:
        grey = (others * torch.tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        return grey.clamp(0, 1), {**how, "channels": "made grey"}
    return others.expand(-1, x.shape[1], -1, -1).contiguous(), {**how, "channels": "grey thrice"}


@hookimpl
def jemkit_evaluators() -> Mapping[str, type[Evaluator]]:
    return {"ood": OOD}
