"""Backbones: JEM variants, ready for any objective."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from jemkit.data import Bounds, Shape, Stream, Task, Views
from jemkit.errors import ConfigError, MisfitError
from jemkit.models.energy import (
    EnergyModel,
    EnergyModelSpec,
    LogitEnergy,
    LogSumExp,
    Network,
    Scores,
)
from jemkit.models.networks import WRN, Adapted, NetworkSpec, seeded_init
from jemkit.options import Options, PartOf
from jemkit.runtime.modes import batch_norms, frozen_batch_stats
from jemkit.sampling.density import Buffer, Contrastive, Density, DensitySpec, ReplayBuffer
from jemkit.sampling.init_dists import Mixture, Start, StartSpec, UniformStart
from jemkit.sampling.kernels import SGLD, Sampler


class Backbone:
    """A model, how its density is sampled and learnt, and how it augments data."""

    def __init__(
        self,
        model: EnergyModel,
        density: Density | None = None,
        *,
        views: Views | None = None,
        bounds: Bounds = Bounds(),
        radius_px: float = 8.0,
    ) -> None:
        self.model, self.density_or_none = model, density
        self.views = Views() if views is None else views
        self.bounds, self.radius_px = bounds, radius_px
        self._separate = bool(batch_norms(model))
        self.scored_streams: set[Stream] = set()  # in updates so far
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # of passes

    @classmethod
    def of_module(
        cls,
        module: nn.Module,
        *,
        shape: Shape,
        n_classes: int,
        rng: Generator,
        sampler: Sampler | None = None,
        steps: int = 10,
        start: Start | None = None,
        buffer: Buffer | None = None,
        views: Views | None = None,
        bounds: Bounds = Bounds(),
        radius_px: float = 8.0,
    ) -> "Backbone":
        """A backbone around any module that maps images in `bounds` to logits [B, K].

        By default, chains are noisy SGLD with a clamped gradient, from uniform pixels. `radius_px`,
        that of objectives which attack, is in 1/255 of the range.
        """
        p0 = UniformStart(shape, bounds) if start is None else start
        states = ReplayBuffer(Buffer() if buffer is None else buffer, p0, n_classes, rng)
        kernel = SGLD(noise=0.01, clip=1.0) if sampler is None else sampler
        density = Contrastive().build(kernel, steps, p0, states, bounds)
        model = LogitEnergy(Adapted(module))
        return cls(model, density, views=views, bounds=bounds, radius_px=radius_px)

    @property
    def has_density(self) -> bool:
        """Whether samples can be drawn; not of a classifier."""
        return self.density_or_none is not None

    @property
    def density(self) -> Density:
        """How p(x) is drawn and learnt; MisfitError if this is a classifier only."""
        if self.density_or_none is None:
            raise MisfitError("this backbone is a classifier only: it has no density to draw from")
        return self.density_or_none

    def scores(self, streams: dict[Stream, Tensor]) -> dict[Stream, Scores]:
        """Every stream's scores, for an update; its images are [B, C, H, W].

        All streams share one pass if the rows are independent. With batch norm each stream has its
        own pass and batch statistics, and only the streams in `views.stats_from` update the running
        ones, or x+ if none of them is there.
        """
        if not streams:
            return {}
        if not self._separate:
            joint = self.model(torch.cat(list(streams.values())))
            parts = joint.split([len(x) for x in streams.values()])
            return dict(zip(streams, parts, strict=True))
        self.scored_streams |= set(streams)
        learnt = set(streams) & set(self.views.stats_from) or set(streams) & {"x_pos"}
        return {name: self._single_pass(x, learn=name in learnt) for name, x in streams.items()}

    def check_learning(self, streams: Iterable[Stream]) -> None:
        """ConfigError if `stats_from` lets no stream update batch norm's running statistics."""
        streamed = sorted(streams)
        named = self.views.stats_from
        usual: tuple[str, ...] = Views.model_fields["stats_from"].default
        wanted = set(named) & set(streamed) or (named == usual and "x_pos" in streamed)
        if self._separate and streamed and not wanted:
            raise ConfigError(
                f"backbone.views.stats_from names {', '.join(named) or 'no stream'}, and this "
                f"objective uses only {', '.join(streamed)}: the running statistics of batch norm "
                f"would never be updated. Name one of those"
            )

    def _single_pass(self, x: Tensor, *, learn: bool) -> Scores:
        if learn:
            return self.model(x)
        with frozen_batch_stats(self.model):
            return self.model(x)


@runtime_checkable
class BackboneSpec(Protocol):
    """A backbone's options; a registered part."""

    def build(self, task: Task, rng: Generator) -> Backbone:
        """Make the model and its density on the generator's device."""


def check_stem(sampler: Sampler, network: Network) -> None:
    """Reject a sampler that needs the first layer separately if the network cannot provide it."""
    if sampler.needs_stem and not network.has_stem:
        raise MisfitError(
            f"the sampler {type(sampler).__name__} differentiates through the first layer alone, "
            f"but this network does not provide its first layer separately; choose another "
            f"sampler, such as sgld"
        )


def without_batch_norm(
    network: NetworkSpec, options: Iterable[str] = ("views.stats_from", "density.batch_norm")
) -> dict[str, str]:
    """Options, of a backbone by default, without effect on a network that declares another norm."""
    norm = getattr(network, "norm", "batch")
    if norm in ("batch", "sync"):
        return {}
    return dict.fromkeys(options, f"on a network without batch norm (norm: {norm})")


def assemble(
    task: Task,
    rng: Generator,
    *,
    network: NetworkSpec,
    energy: EnergyModelSpec,
    views: Views,
    density: DensitySpec | None = None,
    sampler: Sampler | None = None,
    start: StartSpec | None = None,
    buffer: Buffer | None = None,
    steps: int = 0,
) -> Backbone:
    """Build a backbone from its parts; without `density` it is a classifier."""
    with seeded_init(rng):
        model = energy.build(network.build(task.shape), task.n_classes)
    model = model.to(rng.device)
    built_density = None
    if density is not None and sampler is not None and start is not None and buffer is not None:
        check_stem(sampler, model.network)  # before the Gaussians of the start, which take a while
        buffer.check_classes(task.n_classes)
        p0 = start.build(task, rng.device)
        states = ReplayBuffer(buffer, p0, task.n_classes, rng, fill=task.fill)
        built_density = density.build(sampler, steps, p0, states, task.bounds)
    return Backbone(model, built_density, views=views, bounds=task.bounds, radius_px=task.radius_px)


NetworkPart = Annotated[NetworkSpec, PartOf("network")]
"""The type of an option that holds a network: a table with `use`, or an instance."""
EnergyPart = Annotated[EnergyModelSpec, PartOf("energy")]
"""The type of an option that holds an energy: a table with `use`, or an instance."""
DensityPart = Annotated[DensitySpec, PartOf("density")]
"""The type of an option that holds a density: a table with `use`, or an instance."""
SamplerPart = Annotated[Sampler, PartOf("sampler")]
"""The type of an option that holds a sampler: a table with `use`, or an instance."""
StartPart = Annotated[StartSpec, PartOf("start")]
"""The type of an option that holds an initial distribution: a table with `use`, or an instance."""
Steps = Annotated[int, Field(ge=0)]
"""The number of steps of a chain; 0 or more."""


class JEMVariant(Options):
    """What the JEM variants share: a network with an energy, and chains from a replay buffer.

    A variant is a subclass with its paper's defaults; the defaults of this class are SADA-JEM's.
    """

    network: NetworkPart = WRN()  # images to features
    energy: EnergyPart = LogSumExp()  # features to logits and E(x)
    density: DensityPart = Contrastive()  # how p(x) is drawn and learnt
    sampler: SamplerPart = SGLD(step_size=1.0, noise=0.0, clip=1.0)  # one step of a chain
    start: StartPart = Mixture()  # where new chains begin
    buffer: Buffer = Buffer(capacity=10_000, restart=0.05)
    steps: Steps = 10  # M: sampler steps of a chain per training step
    views: Views = Views(augment_pos=False, pos_share=0.5)

    def unused(self) -> dict[str, str]:
        return without_batch_norm(self.network)

    def build(self, task: Task, rng: Generator) -> Backbone:
        parts = {name: getattr(self, name) for name in JEMVariant.model_fields}
        return assemble(task, rng, **parts)  # a variant may have options of its own
