"""Samples of the evaluated model, drawn and cached in batches: a kill loses one at most."""

import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from jemkit.attacks.pixel_model import PixelModel
from jemkit.errors import DataError
from jemkit.metrics.evaluator import Context, Unmeasurable
from jemkit.metrics.plots import to_bytes
from jemkit.options import Options
from jemkit.runtime.rng import generator
from jemkit.runtime.work_cache import Piece
from jemkit.sampling.density import Buffered
from jemkit.sampling.fresh import even_batches, in_batches
from jemkit.sampling.init_dists import Start


class GeneratedImages(NamedTuple):
    """Samples, with the classes and confidences that the evaluated model predicts for them."""

    x: Tensor  # [N, C, H, W], uint8
    y: Tensor  # [N], the predicted classes
    confidence: Tensor  # [N], the largest softmax

    def most_confident(self, share: float) -> "GeneratedImages":
        """This share of each predicted class, the most confident ones, rounded up, in order."""
        selected = torch.zeros(len(self.y), dtype=torch.bool)
        for label in torch.unique(self.y):
            members = (self.y == label).nonzero().squeeze(1)
            order = self.confidence[members].argsort(descending=True, stable=True)
            selected[members[order[: math.ceil(share * len(members))]]] = True
        return GeneratedImages(*(field[selected] for field in self))


def fresh(
    subject: PixelModel, ctx: Context, n: int, about: dict[str, Any], *, steps: int, start: Start
) -> GeneratedImages:
    """The final states of n chains, each batch from its own generator.

    `about` contains what else they depend on: the options of the initial distribution and its data.
    """

    def draw(rows: slice, rng: Generator) -> Tensor:
        return subject.sample(rows.stop - rows.start, rng, steps=steps, start=start)

    how = {"source": "chains", "steps": steps, "start": describe(start), **about}
    return _judged(subject, ctx, n, how, draw)


def buffer_states(subject: PixelModel, ctx: Context, n: int) -> GeneratedImages:
    """n states of the replay buffer; all of them if it has fewer."""
    if not isinstance(subject.density, Buffered):
        raise Unmeasurable("this density has no buffer; draw new chains instead")
    buffer = subject.density.buffer
    if not buffer.chains_begun:
        raise Unmeasurable(
            "the trained replay buffer is missing, and initial states are not samples; "
            "draw fresh chains instead"
        )
    rng = generator(torch.device("cpu"), ctx.seed, "generation", "buffer")
    if n > len(buffer.states):
        ctx.notes.warnings.append(
            f"generation: {n} samples were requested, but the buffer has {len(buffer.states)} "
            "states: these are measured"
        )
    order = torch.randperm(len(buffer.states), generator=rng)[:n]
    states = buffer.states[order.to(buffer.states.device)]
    pixels = subject.bounds.to_unit(subject.bounds.clamp(states)).cpu()

    sha = hashlib.sha256(pixels.contiguous().numpy().data).hexdigest()
    how = {"source": "buffer", "states": sha}
    return _judged(subject, ctx, len(pixels), how, lambda rows, _: pixels[rows])


def _judged(
    subject: PixelModel,
    ctx: Context,
    n: int,
    about: dict[str, Any],
    draw: Callable[[slice, Generator], Tensor],
) -> GeneratedImages:
    """Quantise and classify [0, 1] images, batch by batch."""

    def piece(rows: slice, rng: Generator) -> Piece:
        pixels = draw(rows, rng)
        if not pixels.isfinite().all():
            raise DataError("samples hold NaN or inf: the model's chains diverge")
        x = to_bytes(pixels)
        return {"x": x.cpu(), **_classified(subject, x, ctx)}

    cache = ctx.result_cache(
        {
            "samples": about,
            "seed": ctx.seed,
            "batch_size": ctx.batch_size,
            "density": describe(subject.density),
            **ctx.about_model(subject),
        }
    )
    columns = in_batches(
        even_batches(n), piece, partial(generator, ctx.rng.device, ctx.seed, "generation"),
        cache=cache, poll=ctx.poll, done=lambda rows: ctx.progress("samples", rows, n),
    )  # fmt: skip
    return GeneratedImages(**columns)


def _classified(subject: PixelModel, x: Tensor, ctx: Context) -> dict[str, Tensor]:
    """Cached with the images, so that every process selects the same ones."""
    guesses = []
    with torch.no_grad():
        for part in torch.split(x, ctx.batch_size):
            logits = subject(part.to(ctx.rng.device).float() / 255)
            guesses.append(logits.softmax(dim=1).max(dim=1))
    return {
        "y": torch.cat([guess.indices for guess in guesses]).cpu(),
        "confidence": torch.cat([guess.values for guess in guesses]).cpu(),
    }


def describe(part: Any, depth: int = 2) -> Any:
    """The fields of a part as JSON; tensors are replaced by what they were computed from."""
    if isinstance(part, Options | str | int | float | None):
        return repr(part)
    if isinstance(part, tuple | list):
        return [describe(item, depth) for item in part]
    fields = {} if isinstance(part, Tensor) or not depth else getattr(part, "__dict__", {})
    return {
        "type": type(part).__name__,
        **{name: describe(value, depth - 1) for name, value in fields.items()},
    }
