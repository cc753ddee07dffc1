"""Checks whether a model's outputs are logits.

An attack increases the cross-entropy of the outputs. After a softmax, a sigmoid, a tanh or a clip
this is flat almost everywhere, and the model seems robust. So every model is checked before it is
evaluated: on images, on noise, and on images far outside the range, where a bounded output can be
recognised.
"""

import re
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from jemkit.attacks.pixel_model import PixelModel, with_gradient
from jemkit.data import Images
from jemkit.errors import MisfitError
from jemkit.metrics.figures import wilson
from jemkit.runtime.modes import frozen
from jemkit.selection import stratified

IMAGES, NOISE = 32, 16  # test images that are checked, and images of noise

SCALES = (1e2, 1e4, 1e6)
"""Factors by which images are scaled around grey; a float32 sigmoid is 1 above 17."""

NEAR = 0.02  # rounding of probabilities: bfloat16 rounds their sums by 0.4 %
AT_END = 1e-3  # what counts as at a bound, as a share of the outputs' range

ALL = 0.9  # allowed share of the outputs for scaled images that are at an end of their range
DEAD = 0.25  # allowed share of images without a gradient; intact models have none

Z = 3.29
"""Standard deviations of a one-sided 99.95 % bound.

With some ten indicators per figure, at most one in 200 intact models is flagged by chance, and only
if its share is already at the tolerance.
"""


class Finding(TypedDict):
    """A sign that an accuracy under attack is too high: a failure indicator."""

    name: str
    flag: bool
    found: str  # a sentence with the numbers
    means: str  # the meaning of a flag
    do: str  # what to do about it


def at_least(count: int, n: int) -> float:
    """The lower bound of a share (Wilson 1927)."""
    return wilson(count, n, Z)[0] if n and count > 0 else 0.0


def surely(count: int, n: int, tolerance: float) -> bool:
    """Whether a share is above that of intact models by more than chance."""
    return at_least(count, n) > tolerance


def said(count: int, n: int) -> str:
    return f"{count} of {n} images ({count / n:.1%})"


class Outputs(NamedTuple):
    """The finding about the outputs."""

    finding: Finding
    bounded: bool  # whether they are not logits


def probe_outputs(subject: PixelModel, data: Images, device: torch.device) -> Outputs:
    """Check a model's outputs; raises MisfitError if they are probabilities.

    Log-probabilities are accepted as logits: they differ by a constant per image, which does not
    change the loss.
    """
    part = data.take(stratified(data.y, IMAGES)).to(device)
    x = part.unit()
    rng = Generator(device).manual_seed(0)
    noise = torch.rand((NOISE, *x.shape[1:]), generator=rng, device=device)
    with torch.no_grad():
        logits = _finite(torch.cat([subject(x), subject(noise), subject(noise.round())]).double())
    far = _far(subject, x, rng)
    _check_no_probabilities(logits, far)
    reason = _named(subject, x[:2]) or _steady(logits) or _stays(far)
    dead = _without_gradient(subject, x, part.y)
    return Outputs(_finding(reason, logits, dead, len(x)), reason is not None)


def _finding(reason: str | None, logits: Tensor, dead: int, n: int) -> Finding:
    low, high = (float(f(logits)) for f in (torch.min, torch.max))
    about = f"outputs from {low:.4g} to {high:.4g}; {said(dead, n)} give the loss no gradient"
    if reason:
        return Finding(
            name="outputs",
            flag=True,
            found=f"{reason}; {about}",
            means="the outputs are not logits: their bound flattens the loss, so an attack finds "
            "less than there is to find",
            do="remove the final sigmoid, tanh, clip or normalisation and evaluate the logits",
        )
    return Finding(
        name="outputs",
        flag=surely(dead, n, DEAD),
        found=about,
        means="gradients vanish on images as they are: the logits are too large for the loss, or "
        "no path leads from them to the pixels",
        do="divide the logits by their scale, or fix the path; do not rely on gradient attacks "
        "alone",
    )


def _finite(outputs: Tensor) -> Tensor:
    return outputs[outputs.isfinite().all(dim=1)]


def _steady(z: Tensor) -> str | None:
    """Whether every row [B, K] on images and noise has the same norm."""
    size, spread = z.norm(dim=1), z.var(dim=0, correction=0).sum().sqrt()
    if spread > 0.1 * size.mean() and size.std(correction=0) <= 1e-3 * size.mean():
        return f"every image's outputs have the norm {float(size.mean()):.4g}"
    return None


def _far(subject: PixelModel, x: Tensor, rng: Generator) -> list[Tensor]:
    """Finite outputs for images scaled around grey, at each scale; none if the model rejects it."""
    noise = torch.rand((NOISE, *x.shape[1:]), generator=rng, device=x.device)
    base = torch.cat([x[:NOISE], noise]) - 0.5
    try:
        with torch.no_grad():
            logits = [_finite(subject(scale * base).double()) for scale in SCALES]
    except (RuntimeError, ValueError, AssertionError, IndexError, ArithmeticError):
        return []  # a model may reject values outside the range
    return [z for z in logits if len(z) >= len(base) // 2]


def _stays(far: list[Tensor]) -> str | None:
    """Whether outputs, of several classes, approach two values however large the images are."""
    for z in far:
        low, high = z.min(), z.max()
        near = AT_END * (high - low)
        above, below = z >= high - near, z <= low + near
        several = all(int(side.any(0).sum()) >= 2 for side in (above, below))
        if several and high > low and float((above | below).double().mean()) >= ALL:
            return (
                f"whatever the image, outputs stay between {float(low):.4g} and {float(high):.4g}"
            )
    return None


def _check_no_probabilities(logits: Tensor, far: list[Tensor]) -> None:
    """Reject rows [B, K] in [0, 1] that sum to 1, up to rounding or small noise, for any image.

    The sums must vary much less than the entries, since small positive logits are not
    probabilities. Equal rows prove nothing.
    """
    sums, spread = logits.sum(dim=1), logits.std(dim=0, correction=0).norm()
    inside = all(bool(((z >= -NEAR) & (z <= 1 + NEAR)).all()) for z in (logits, *far))
    mean, wide = float(sums.mean()), float(sums.std(correction=0))
    if not inside or abs(mean - 1) > NEAR or spread <= 1e-6 or wide > spread / 4:
        return
    raise MisfitError(
        f"the model outputs probabilities, not logits: its rows lie in [0, 1] and sum to 1 (these "
        f"to {mean:.4g}). The cross-entropy of an attack has no slope there: remove the last "
        "softmax "
        "or return log-probabilities"
    )


def _without_gradient(subject: PixelModel, x: Tensor, y: Tensor) -> int:
    """The number of images without a gradient of the cross-entropy."""
    model, z = with_gradient(subject, x[:2]), x.clone().requires_grad_()
    with frozen(model), torch.enable_grad():
        (grad,) = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
    size = grad.flatten(1).abs().amax(1)
    return int((size < torch.finfo(size.dtype).tiny).sum())


SQUASHING = {
    "Sigmoid", "Tanh", "Softmax", "Hardtanh", "Hardsigmoid", "Erf", "Atan", "Sin", "Cos",
    "CosineSimilarity",
}  # fmt: skip
"""Operations with bounded results, by torch's names of their gradients."""

KEEPING = {
    "View", "UnsafeView", "ReshapeAlias", "ToCopy", "Clone", "Alias", "Squeeze", "Unsqueeze", "T",
    "Transpose", "Permute", "Slice", "Select", "Index", "Expand", "Neg", "Mean", "Amax", "Amin",
    "AvgPool2D", "MeanPool2D", "MaxPool2DWithIndices", "Mul", "Add", "Sub", "Rsub", "Cat", "Stack",
    "Where", "Maximum", "Minimum",
}  # fmt: skip
"""Operations whose result is bounded if all inputs are; weights are constants here."""

TO_DENOMINATOR = {"Expand", "ClampMin", "Clamp", "Add", "ToCopy", "Unsqueeze", "View", "Alias"}
DENOMINATORS = {"LinalgVectorNorm", "Norm", "Abs"}
"""Operations in the denominator of a normalisation or of softsign, or between."""


def _named(subject: PixelModel, x: Tensor) -> str | None:
    """The bounded operation in which the outputs end, by the graph of their gradient, or None."""
    z = x.clone().requires_grad_()
    with frozen(subject), torch.enable_grad():
        step = _bounded(subject(z).grad_fn, 40)
    return f"the outputs end in a bounded step, {step}" if step else None


def _bounded(node: Any, depth: int) -> str | None:
    """The name of the operation that bounds a node of the graph, else None."""
    if node is None or depth == 0:
        return None
    kind, parts = _kind(node), [part for part, _ in node.next_functions]
    saved = (getattr(node, f"_saved_{side}", None) for side in ("min", "max"))
    if kind in SQUASHING or (kind == "Clamp" and None not in saved):
        return str(kind).lower()
    if kind == "Div":
        if len(parts) > 1 and parts[1] is not None:
            return "normalisation" if _divides_by_size(parts[1], 8) else None
        return _bounded(parts[0], depth - 1)
    if kind in ("Mm", "Addmm"):
        return "cosine" if _cosine(node, parts) else None
    if kind not in KEEPING:
        return None
    reasons = [_bounded(part, depth - 1) for part in parts if part is not None]
    return reasons[0] if reasons and all(reasons) else None


def _kind(node: Any) -> str:
    return re.sub(r"Backward\d*$", "", type(node).__name__)


def _divides_by_size(node: Any, depth: int) -> bool:
    if node is None or depth == 0:
        return False
    if _kind(node) in DENOMINATORS:
        return True
    parts = [part for part, _ in node.next_functions]
    return _kind(node) in TO_DENOMINATOR and any(_divides_by_size(p, depth - 1) for p in parts)


def _cosine(node: Any, parts: list[Any]) -> bool:
    """Whether features of norm 1 are multiplied by weights of equal norms."""
    weights = getattr(node, "_saved_mat2", None)
    features = parts[0 if _kind(node) == "Mm" else 1]
    if weights is None or features is None or _kind(features) != "Div":
        return False
    lengths = weights.detach().double().norm(dim=0)
    same = bool((lengths - lengths.mean()).abs().max() <= 1e-3 * lengths.mean())
    return same and _bounded(features, 8) == "normalisation"
