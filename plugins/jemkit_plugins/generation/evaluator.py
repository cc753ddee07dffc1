"""Generation: the distance between samples and the data, by FID and related measures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BeforeValidator, Field, InstanceOf, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor

from jemkit import (
    ConfigError, Context, DataError, Evaluator, Figure, Images, MisfitError, Options, PartOf,
    PixelModel, Start, StartSpec, Task, Unmeasurable, hookimpl,
)  # fmt: skip
from jemkit.evaluation.sample import STEPS
from jemkit.metrics import plots
from jemkit.metrics.figures import plain
from jemkit.metrics.plots import to_bytes
from jemkit.runtime.rng import generator
from jemkit.sampling.density import together
from jemkit.sampling.fresh import even_batches
from jemkit.sampling.init_dists import MomentStart, start_name
from jemkit.data import images_hash
from jemkit_plugins.generation import fid, statistics
from jemkit_plugins.generation.features import (
    PIECE, Features, Extracted, inception, inception_file, own, extracted,
)  # fmt: skip
from jemkit_plugins.generation.samples import GeneratedImages, fresh, buffer_states

CPU = torch.device("cpu")
UNBIASED = 10_000
"""Number of samples from which on FID is reported without its extrapolation."""

QUICK, QUICK_REFERENCE = 256, 2_500
GRID, SHOWN, NEIGHBOURS = 100, 20, 5  # of the pictures
SPLITS, K, TOP_SHARE = 10, 3, 0.9  # of an Inception score; of precision and recall; of top90
SUBSETS, SUBSET = 100, 1000  # of the kernel distance
OTHERWISE = {"fid": "fd", "kid": "kd"}
"""Measures named so only with Inception features, and their names with other features."""

QUANTISATION = "8 bits, rounded and clamped"


def _part(value: Any) -> Any:
    return {"use": value} if isinstance(value, str) else value


class Generation(Options):
    """Frechet and kernel distance, precision and recall of samples against training images.

    With Inception features, which need their weights, these are FID and KID, and an Inception score
    is added. With other features the names contain the features, such as `fd-self` for features of
    the evaluated model itself: this is not FID, and cannot be compared between models.
    """

    runs_attacks: ClassVar[bool] = False  # those of --attack
    standard_at_any: ClassVar = frozenset({"n", "inception"})  # both are part of the protocol

    n: int = Field(2_500, ge=16)  # papers take 10,000 or 50,000: fewer make every distance larger
    steps: int = Field(STEPS, ge=0)  # of each chain
    # where new chains begin; None: where those of training begin
    start: Annotated[Annotated[StartSpec, PartOf("start")] | None, BeforeValidator(_part)] = None
    source: Literal["chains", "buffer"] = "chains"  # the buffer is an artefact of training
    selection: Literal["none", "top90"] = "none"  # top90: the most confident of each class
    reference: Literal["train", "train+test"] = "train"  # images that samples are compared with
    max_reference: int | None = Field(None, ge=16)  # drawn at random; None: all
    statistics: Path | None = None  # of the reference, by `jemkit fid-stats`; only FID
    inception: Path | None = None  # its weights; None: those in torch's cache or of a package
    features: SkipJsonSchema[InstanceOf[Features] | None] = Field(None, exclude=True, repr=False)

    @field_validator("inception")
    @classmethod
    def _there(cls, path: Path | None) -> Path | None:
        """Before any attack runs: a requested FID needs its weights."""
        if path is not None:
            inception_file(path)
        return path

    @field_validator("statistics")
    @classmethod
    def _readable(cls, path: Path | None) -> Path | None:
        """Before any attack runs: check that the file contains statistics."""
        if path is not None:
            statistics.read(path)
        return path

    @model_validator(mode="after")
    def _weights_of_statistics(self) -> Self:
        """Before any attack runs: statistics are compared with samples in Inception's features."""
        if self.statistics is not None and self.features is None:
            inception_file(self.inception)
        return self

    @staticmethod
    def write_statistics(images: Images, out: Path, about: dict[str, Any], **how: Any) -> Any:
        """`jemkit fid-stats`: see `statistics.write_of`."""
        return statistics.write_of(images, out, about, **how)

    def unused(self) -> dict[str, str]:
        idle = {} if self.source == "chains" else dict.fromkeys(
            ("steps", "start"), 'where source = "buffer"'
        )  # fmt: skip
        fixed = ("reference", "max_reference") if self.statistics else ()
        return idle | dict.fromkeys(fixed, "where statistics are given")

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        if not subject.has_density:
            raise Unmeasurable("the model is a classifier without a density: nothing to sample")
        features = self._features(subject, ctx)
        reference = self._reference(ctx)
        fixed = statistics.read(self.statistics) if self.statistics else None
        if fixed is not None:
            fixed.check(features, tuple(reference.x.shape[1:]))
        samples = self._generated(subject, ctx, reference)
        if samples.x.shape[1:] != reference.x.shape[1:]:
            raise MisfitError(
                f"samples are {list(samples.x.shape[1:])} and the reference's images "
                f"{list(reference.x.shape[1:])}; evaluate the model on the data set that it was "
                "trained on"
            )
        label = "" if self.selection == "none" else f"-{self.selection}"
        x = samples.most_confident(TOP_SHARE).x if self.selection == "top90" else samples.x
        if len(x) < fid.FULL_RANK:
            ctx.notes.warnings.append(
                f"generation is measured on {len(x)} samples, under {fid.FULL_RANK:,}: its "
                "distances are too large to be compared with others'"
            )
        _show(x, ctx, label)
        ours = extracted(features, x, ctx, "features of samples")
        card = self._card(subject, ctx, features, reference, len(x))
        if fixed is None:
            theirs = extracted(features, _bytes(reference), ctx, "features of the reference")
            figures = _measured(ours, theirs, ctx)
        else:
            card["reference"] = {"set": "statistics", **fixed.about}
            figures = {"fid": _frechet(ours.features, fixed.moments, ctx)}
        return [
            plain(_name(name, features) + label, value, len(x), {**card, **extra})
            for name, (value, extra) in figures.items()
        ]

    def _features(self, subject: PixelModel, ctx: Context) -> Features:
        """The extractor to use: the given one, else Inception, else the model's own network."""
        if self.features is not None:
            return self.features
        try:
            features = inception(inception_file(self.inception), ctx.rng.device)
            if features.card["weights"] == "unknown":
                ctx.notes.warnings.append(
                    f"generation: Inception's weights of SHA-256 {features.card['sha256']} are not "
                    f"known to give published FIDs"
                )
            return features
        except (DataError, ConfigError) as error:
            if self.inception is not None:
                raise
            own_features, reason = own(subject), str(error)
        if own_features is None:
            raise Unmeasurable(f"the model has no network whose features could serve; {reason}")
        ctx.notes.warnings.append(
            f"{reason}. Measured instead: fd-self and similar, which are not FID"
        )
        return own_features

    def _reference(self, ctx: Context) -> Images:
        """The reference images: all training and validation images of the data set."""
        names = ["train", "valid", *(["test"] if self.reference == "train+test" else [])]
        parts = [ctx.split(name) for name in names]
        whole = Images(torch.cat([p.x.cpu() for p in parts]), torch.cat([p.y.cpu() for p in parts]))
        limit = min(self.max_reference or len(whole.y), QUICK_REFERENCE if ctx.quick else 2**31)
        if limit >= len(whole.y):
            return whole
        rng = generator(CPU, ctx.seed, "generation", "reference")
        return whole.take(torch.randperm(len(whole.y), generator=rng)[:limit].sort().values)

    def _count(self, ctx: Context) -> int:
        """The number of samples to draw."""
        return min(self.n, QUICK) if ctx.quick else self.n

    def _generated(self, subject: PixelModel, ctx: Context, reference: Images) -> GeneratedImages:
        n = self._count(ctx)
        if self.source == "buffer":
            return buffer_states(subject, ctx, n)
        about = {"option": repr(self.start), "reference": images_hash(reference)}
        start = self._start(subject, ctx)
        if isinstance(start, MomentStart):
            try:
                _ = start.gaussians
            except DataError as error:
                raise Unmeasurable(str(error)) from None
        return fresh(subject, ctx, n, about, steps=self.steps, start=start)

    def _start(self, subject: PixelModel, ctx: Context) -> Start:
        if self.start is None:
            return subject.density.start
        train = ctx.split("train")
        channels, height, width = train.x.shape[1:]
        task = Task(
            shape=(channels, height, width),
            n_classes=int(train.y.max()) + 1,
            radius_px=ctx.threat.radius_px,
            n_train=len(train.y),
            total_steps=0,
            images=ctx.split,
            hash=images_hash(train),
            bounds=subject.bounds,
        )
        return self.start.build(task, ctx.rng.device)

    def _card(
        self, subject: PixelModel, ctx: Context, features: Features, reference: Images, n: int
    ) -> dict[str, Any]:
        chains, side = self.source == "chains", None
        if chains:
            sizes = even_batches(self._count(ctx))
            side = together(subject.density, subject.model, sizes)
        start = repr(self.start) if self.start else start_name(subject.density.start)
        return {
            **ctx.card,
            "split": "generated",
            "images": n,
            "n": n,
            "few": n < fid.FULL_RANK,
            "source": self.source,
            "steps": self.steps if chains else None,
            "start": start if chains else None,
            "together": side,
            "sampler": repr(subject.density.sampler),
            "selection": self.selection,
            "reference": {
                "set": self.reference,
                "count": len(reference.y),
                "sha256": images_hash(reference),
            },
            "quantisation": QUANTISATION,
            "features": {"name": features.name, **features.card},
            "seed": ctx.seed,
        }


def _bytes(images: Images) -> Tensor:
    return images.x if images.x.dtype == torch.uint8 else to_bytes(images.x)


def _name(measure: str, features: Features) -> str:
    """The name of a figure: the bare measure only with Inception features."""
    if features.is_inception:
        return measure
    return f"{OTHERWISE.get(measure, measure)}-{features.name}"


def _measured(
    ours: Extracted, theirs: Extracted, ctx: Context
) -> dict[str, tuple[float, dict[str, Any]]]:
    """Every measure by name: its value, and additions to its protocol."""
    rng = generator(CPU, ctx.seed, "generation", "subsets")
    a, b = (side.features.to(ctx.rng.device) for side in (ours, theirs))
    kid = fid.kernel_distance(a, b, rng, subsets=SUBSETS, size=SUBSET)
    few = b[torch.randperm(len(b), generator=rng)[: len(a)].to(b.device)]
    precision, recall = fid.precision_recall(a, few, k=K)
    subsets = {"std": kid.std, "subsets": SUBSETS, "subset_size": min(SUBSET, len(a), len(b))}
    balls = {"neighbours": K, "reference_rows": len(few)}
    figures: dict[str, tuple[float, dict[str, Any]]] = {
        "fid": _frechet(a, fid.moments(torch.split(b, PIECE)), ctx),
        "kid": (kid.mean, subsets),
        "precision": (precision, balls),
        "recall": (recall, balls),
    }
    if ours.logits is not None:
        score = fid.inception_score(ours.logits, splits=SPLITS)
        figures["is"] = (score.mean, {"std": score.std, "splits": SPLITS})
    return figures


def _frechet(rows: Tensor, reference: fid.Moments, ctx: Context) -> tuple[float, dict[str, Any]]:
    """The distance and, for few samples, its extrapolation to infinitely many."""
    distance = fid.frechet(fid.moments(torch.split(rows, PIECE)), reference)
    if len(rows) >= UNBIASED:
        return distance, {}
    rng = generator(CPU, ctx.seed, "generation", "infinity")
    return distance, {"infinity": fid.at_infinity(rows, reference, rng)}


def _show(x: Tensor, ctx: Context, label: str) -> None:
    """The first samples with the training images nearest to them, which would show copies."""
    samples, train = x[:SHOWN].float() / 255, ctx.split("train")
    k = min(NEIGHBOURS, len(train.y))
    distances, nearest = fid.nearest_rows(samples, train.unit().cpu(), k)
    ctx.notes.pictures[f"samples{label}"] = plots.grid(x[:GRID].float() / 255)
    neighbours = Images(train.x.cpu()[nearest.flatten()], nearest).unit()
    neighbours = neighbours.view(*nearest.shape, *samples.shape[1:])
    ctx.notes.pictures[f"neighbours{label}"] = plots.neighbours(samples, neighbours)
    ctx.notes.tables[f"neighbours{label}"] = {
        "distance": "L2 of pixels in [0, 1] to the nearest training image",
        "mean_distance": float(distances[:, 0].mean()),
        "distances": distances[:, 0].tolist(),
    }


@hookimpl
def jemkit_evaluators() -> Mapping[str, type[Evaluator]]:
    return {"generation": Generation}
