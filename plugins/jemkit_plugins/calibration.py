"""Calibration (Guo et al., ICML 2017): whether confidence equals the share of correct answers."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from jemkit import (
    ConfigError, Context, DataError, Evaluator, Figure, Images, Options, PixelModel, batches,
    hookimpl,
)  # fmt: skip
from jemkit.metrics.figures import joined, plain

COLDEST, HOTTEST = 0.01, 100.0
"""The range in which the temperature is fitted."""

QUICK = 512
"""Validation images with --quick."""


UNKNOWN = "the model may have been trained on the images that its temperature is fitted on"


class Calibration(Options):
    """Expected calibration error, log-likelihood and Brier score, with and without a temperature.

    The temperature is fitted on validation images only; without any, its figures are omitted.
    """

    runs_attacks: ClassVar[bool] = False  # those of --attack

    bins: int = Field(20, ge=1)  # of equal width, as in the JEM papers

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        logits, y = _outputs(subject, data, ctx, "calibration")
        table = reliability(logits, y, self.bins)
        ctx.notes.tables["reliability"] = table.to_json()
        card = {**ctx.card, "bins": self.bins, "widths": "equal, each without its lower edge"}
        values = {"ece": table.ece, "nll": nll(logits, y), "brier": brier(logits, y)}
        figures = [plain(name, value, len(y), card) for name, value in values.items()]
        return figures + self._scaled(subject, logits, y, ctx, card)

    def _scaled(
        self, subject: PixelModel, logits: Tensor, y: Tensor, ctx: Context, card: dict[str, Any]
    ) -> list[Figure]:
        """The temperature, and the figures of the test images scaled by it."""
        try:
            valid = ctx.split("valid")
        except (ConfigError, DataError) as error:
            ctx.notes.warnings.append(f"calibration: no temperature, since {error}")
            return []
        part = Images(valid.x[:QUICK], valid.y[:QUICK]) if ctx.quick else valid
        held_out, labels = _outputs(subject, part, ctx, "temperature")
        t = temperature(held_out, labels)
        if t in (COLDEST, HOTTEST):
            ctx.notes.warnings.append(
                f"calibration: the temperature {t:g} is the end of its range; on validation images "
                "that are all right, or no better than chance, the likelihood has no maximum"
            )
        after = reliability(logits / t, y, self.bins)
        card = {**card, "fitted_on": "valid", "fitted_images": len(labels)}
        if not ctx.held_out:
            card = joined(card, {"standard": False, "why": UNKNOWN})
        values = {"temperature": t, "ece_scaled": after.ece, "nll_scaled": nll(logits / t, y)}
        ns = {"temperature": len(labels)}
        cards = {"temperature": {**card, "split": "valid"}}
        return [
            plain(name, value, ns.get(name, len(y)), cards.get(name, card))
            for name, value in values.items()
        ]


class Reliability(NamedTuple):
    """Bins of confidence: the mean confidence and the accuracy in each."""

    edges: list[float]
    confidence: list[float | None]  # mean of the bin; None where it is empty
    accuracy: list[float | None]
    images: list[int]

    def to_json(self) -> dict[str, Any]:
        return {
            "edges": self.edges,
            "confidence": self.confidence,
            "accuracy": self.accuracy,
            "count": self.images,
        }

    @property
    def ece(self) -> float:
        """Mean of |accuracy - confidence| over the bins, weighted by their number of images."""
        gaps = [
            n * abs(right - sure)
            for n, right, sure in zip(self.images, self.accuracy, self.confidence, strict=True)
            if right is not None and sure is not None
        ]
        return sum(gaps) / sum(self.images)


def reliability(logits: Tensor, y: Tensor, bins: int) -> Reliability:
    """The reliability table of logits [N, K] with labels y [N]."""
    sure, label = logits.double().softmax(1).max(1)
    return binned(sure, label == y, bins)


def binned(confidence: Tensor, right: Tensor, bins: int) -> Reliability:
    """Bins (low, high] of equal width over [0, 1]; the first one includes 0."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    index = torch.bucketize(confidence.double(), edges[1:-1])
    count = torch.bincount(index, minlength=bins)

    def means(values: Tensor) -> list[float | None]:
        sums = torch.bincount(index, weights=values.double(), minlength=bins)
        return [float(s / n) if n else None for s, n in zip(sums, count.tolist(), strict=True)]

    return Reliability(edges.tolist(), means(confidence), means(right), count.tolist())


def nll(logits: Tensor, y: Tensor) -> float:
    """Mean of -log p(y | x), in nats."""
    return float(F.cross_entropy(logits.double(), y))


def brier(logits: Tensor, y: Tensor) -> float:
    """Squared distance of p(. | x) from the label over all classes (Brier 1950): 0 to 2."""
    p = logits.double().softmax(1)
    return float((p - F.one_hot(y, p.shape[1])).square().sum(1).mean())


def temperature(logits: Tensor, y: Tensor) -> float:
    """The T > 0 that maximises the likelihood of logits / T.

    The log-likelihood is concave in 1 / T, so the optimum is where its slope changes sign; it is
    found by bisection of log T. If the slope does not change sign, T is the end of the range.
    """
    z = logits.double()
    truth = z.gather(1, y[:, None]).squeeze(1)

    def slope(t: float) -> float:
        """The slope in 1 / T: the mean of the expected logit less the label's logit."""
        return float(((z / t).softmax(1).mul(z).sum(1) - truth).mean())

    here = slope(1.0)
    if math.isnan(here):
        return here
    if here == 0:  # the end of the range, or a constant model, which no temperature changes
        return 1.0
    if slope(COLDEST) <= 0 or slope(HOTTEST) >= 0:
        return COLDEST if slope(COLDEST) <= 0 else HOTTEST
    low, high = COLDEST, HOTTEST
    while high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.sqrt(low * high)


def _outputs(subject: PixelModel, data: Images, ctx: Context, what: str) -> tuple[Tensor, Tensor]:
    """Logits [N, K] in float64 and labels [N], on the CPU."""
    with torch.no_grad():
        rows = [(subject(x).double().cpu(), y.long().cpu()) for x, y in batches(data, ctx, what)]
    logits, labels = zip(*rows, strict=True)
    return torch.cat(logits), torch.cat(labels)


@hookimpl
def jemkit_evaluators() -> Mapping[str, type[Evaluator]]:
    return {"calibration": Calibration}
