"""Evaluators: measurements of a model, and the context that they get."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from jemkit.attacks.base import Attack, ModelAttack, Threat
from jemkit.attacks.departures import departures, with_departures
from jemkit.attacks.pixel_model import PixelModel, weights_hash
from jemkit.data import Images
from jemkit.errors import MisfitError, NotFinite, Preempted
from jemkit.metrics.figures import Figure, share
from jemkit.metrics.identity import identity_of
from jemkit.options import Options
from jemkit.runtime.microbatch import retry_on_oom
from jemkit.runtime.modes import eval_mode, frozen
from jemkit.runtime.run_dir import versions
from jemkit.runtime.work_cache import WHOLE, ResultCache, Shard, tensors_hash

AnyAttack = Attack | ModelAttack


class Unmeasurable(MisfitError):
    """An evaluator lacks a requirement: a density, other splits, a file of weights.

    It is skipped with this reason, unless it was requested by name.
    """


@dataclass(frozen=True)
class Notes:
    """What evaluators add to the record besides figures."""

    tables: dict[str, Any] = field(default_factory=dict)  # JSON, by name
    rows: dict[str, Tensor] = field(default_factory=dict)  # one value an image, by name
    pictures: dict[str, bytes] = field(default_factory=dict)  # PNG, by name
    adversarial: dict[str, Tensor] = field(default_factory=dict)  # x~ by attack, [N, C, H, W]
    warnings: list[str] = field(default_factory=list)
    caches: list[ResultCache] = field(default_factory=list)  # not needed once recorded


Progress = Callable[[str, int, int], None]  # the name of long work, how much is done, of how much


def no_progress(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Context:
    """The context of an evaluator: everything that it needs besides the model."""

    rng: Generator  # for this evaluator only, from the seed and its name
    threat: Threat
    seed: int = 0
    batch_size: int = 250
    card: dict[str, Any] = field(default_factory=dict)  # part of every figure's protocol
    code: str = ""  # what cached work depends on besides the weights: see `identity_of`
    attacks: Mapping[str, AnyAttack] = field(default_factory=dict)  # requested, by name
    images: Callable[[str], Images] | None = None  # train, valid and test, as far as they exist
    held_out: bool = True  # whether the model was not trained on the validation images
    others: Callable[[], Mapping[str, Images]] = dict  # test images of other data sets beside it
    quick: bool = False  # quick: evaluators use few images
    no_logits: str | None = None  # why the model's outputs are not logits, if that was detected
    work: Path | None = None  # caches unfinished work; None caches nothing
    shard: Shard = WHOLE
    progress: Progress = no_progress
    stop: Callable[[], bool] = bool  # never
    notes: Notes = field(default_factory=Notes)

    def poll(self) -> None:
        """Raise Preempted if a stop was requested."""
        if self.stop():
            raise Preempted("stopped; finished batches are saved, and the same command continues")

    def result_cache(self, about: dict[str, Any]) -> ResultCache:
        """The cache of work that depends on `about`."""
        cache = ResultCache(self.work, {**about, "versions": versions()}, self.shard)
        self.notes.caches.append(cache)
        return cache

    def about_model(self, subject: PixelModel) -> dict[str, Any]:
        """Everything of a model on which cached work depends."""
        return {
            "model": weights_hash(subject),
            "code": self.code or identity_of(subject).sha256,
            "buffers": tensors_hash(dict(subject.named_buffers())),  # a state dict omits some
            "subject": re.sub(r" at 0x[0-9a-f]+", "", repr(subject)),  # without addresses in memory
            "bounds": list(subject.bounds),
            "device": self.rng.device.type,
        }

    def split(self, name: str) -> Images:
        """The images of another split; Unmeasurable if there are none."""
        if self.images is None:
            raise Unmeasurable(f"there are no {name} images beside the test images")
        return self.images(name)


@runtime_checkable
class Evaluator(Protocol):
    """Measures a model on labelled images."""

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]: ...


def measure(
    subject: PixelModel, data: Images, evaluators: Sequence[Evaluator], ctx: Context
) -> list[Figure]:
    """Every evaluator's figures for the model, in eval mode with frozen weights."""
    before, subject.poll = subject.poll, ctx.poll
    try:
        with frozen(subject), eval_mode(subject):
            return [
                figure._replace(protocol=with_departures(figure.protocol, missing))
                for judge in evaluators
                for missing in [departures(judge, ctx.threat)]
                for figure in retry_on_oom(partial(judge, subject, data, ctx), ctx.rng)
            ]
    finally:
        subject.poll = before
        if ctx.work is None:
            for cache in ctx.notes.caches:
                cache.remove()


def batches(data: Images, ctx: Context, what: str = "") -> Iterator[tuple[Tensor, Tensor]]:
    """[0, 1] images and labels, batch by batch, on the generator's device."""
    total = len(data.y)
    for at in range(0, total, ctx.batch_size):
        part = data.take(slice(at, at + ctx.batch_size)).to(ctx.rng.device)
        yield part.unit(), part.y
        if what:
            ctx.progress(what, min(at + ctx.batch_size, total), total)


class Accuracy(Options):
    """The share of correctly classified images, with its 95 % Wilson interval."""

    runs_attacks: ClassVar[bool] = False

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        right = []
        with torch.no_grad():
            for x, y in batches(data, ctx, "clean accuracy"):
                logits = subject(x)
                if not logits.isfinite().all():  # argmax would accept NaN as a class
                    raise NotFinite("the model's logits contain NaN or inf on clean images")
                right.append((logits.argmax(1) == y).cpu())
        rows = torch.cat(right)
        ctx.notes.rows["clean"] = rows
        return [share("clean", int(rows.sum()), len(rows), ctx.card)]
