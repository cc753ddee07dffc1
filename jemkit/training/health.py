"""HealthMonitor: passes the metrics of each step and epoch to the sentinel."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor

from jemkit.data import Bounds, Images
from jemkit.errors import NotFinite
from jemkit.models.energy import ModelEnergy
from jemkit.runtime.divergence_monitor import Finding, RunStatistics, Sentinel, Unhealthy
from jemkit.runtime.microbatch import retry_on_oom
from jemkit.runtime.modes import batch_norms, sampling_mode
from jemkit.sampling.density import Buffered, ReplayBuffer
from jemkit.sampling.kernels import gradient
from jemkit.selection import stratified
from jemkit.training.build import RunState

CHAINS = 32
"""Chains of the buffer whose gradients are examined after an epoch."""


class HealthMonitor:
    """Raises Unhealthy with the first finding; `statistics` is what it remembers between checks."""

    def __init__(self, options: Sentinel, parts: RunState) -> None:
        self.options, self.parts, self.statistics = options, parts, RunStatistics(options)
        learns = parts.objective.needs_density
        self.chains = parts.backbone.density_or_none if learns else None  # that it draws from
        valid = parts.splits.images("valid").y
        self._images, self._chance = len(valid), float(valid.bincount().max() / len(valid))
        self.limit = edge_limit(parts.splits.images("train"), options.stuck)

    @property
    def buffer(self) -> ReplayBuffer | None:
        """The replay buffer, if the objective learns with one."""
        return self.chains.buffer if isinstance(self.chains, Buffered) else None

    def rows(self, rows: Iterable[dict[str, Any]]) -> None:
        """Check every step's metrics, in order."""
        for row in rows if self.options.on else ():
            _raise(self.statistics.row(row))

    @contextmanager
    def outputs(self, step: int) -> Iterator[None]:
        """Validation after an epoch: outputs that are not finite are a finding.

        Its last update may have had a finite loss and gradient, and no step followed.
        """
        try:
            yield
        except NotFinite as error:
            since = step - self.parts.loader.steps_per_epoch
            raise Unhealthy("outputs", since, str(error)) from None

    def body(self, step: int, average: Mapping[str, Tensor]) -> dict[str, float]:
        """Check weights, statistics and buffer after an epoch; returns sizes that must not grow."""
        if not self.options.on:
            return {}
        since, model = step - self.parts.loader.steps_per_epoch, self.parts.backbone.model
        broken = unfit(model.state_dict()) or unfit(average)
        if broken is not None:
            raise Unhealthy("weights", since, f"not finite: {broken}")
        sizes = {}
        variances = [n.running_var for n in batch_norms(model) if n.running_var is not None]
        if variances:
            largest = torch.stack([v.max() for v in variances]).max()
            sizes["running variance of batch norm"] = float(largest)
        if self.buffer is not None:
            _raise(self._stuck(self.buffer, since))
            states = self.buffer.states[:CHAINS]
            with sampling_mode(model, "batch_stats"):  # nothing is drawn or moved
                slopes = retry_on_oom(lambda: gradient(ModelEnergy(model), states))
            steepness = slopes.flatten(1).norm(dim=1).median()
            sizes["gradient norm of the chains' energies"] = float(steepness)
        return sizes

    def _stuck(self, buffer: ReplayBuffer, since: int) -> Finding | None:
        if not buffer.states.isfinite().all():
            return Finding("buffer", since, "not finite: states of the replay buffer")
        share = float(unhealthy_slots(buffer, self.parts.task.bounds, self.limit).float().mean())
        if share <= self.options.stuck:
            return None
        stuck = f"{share:.0%} of the replay buffer's chains are stuck"
        return Finding("buffer", since, f"{stuck} at the boundary of the pixel range")

    def epoch(self, step: int, sizes: Mapping[str, float], accuracies: list[float]) -> None:
        """Check the statistics from `body`, and validation accuracy after every epoch so far."""
        if not self.options.on:
            return
        since = step - self.parts.loader.steps_per_epoch
        for name, size in sizes.items():
            _raise(self.statistics.level(name, size, since))
        since = step - self.options.collapse * self.parts.loader.steps_per_epoch
        _raise(self.statistics.accuracy(accuracies, self._chance, self._images, max(0, since)))


def _raise(finding: Finding | None) -> None:
    if finding is not None:
        raise Unhealthy(*finding)


def edge_limit(images: Images, stuck: float) -> float:
    """The share of a chain's pixels at the boundary of the range above which it counts as stuck.

    Only pixels that are inside the range in the data count: half the pixels of a digit are black.
    """
    unit = images.take(stratified(images.y, 1000)).unit()
    data = float(((unit <= 0) | (unit >= 1)).float().mean())
    return data + stuck * (1 - data)


def unfit(tensors: Mapping[str, Tensor]) -> str | None:
    """The first that contains a NaN or an infinity; synchronises with the device once."""
    named = {n: t for n, t in tensors.items() if t.is_floating_point()}
    sums = [t.detach().sum().float() for t in named.values()]
    if not sums or torch.stack(sums).isfinite().all():
        return None
    return next((name for name, t in named.items() if not t.isfinite().all()), None)


def unhealthy_slots(buffer: ReplayBuffer, bounds: Bounds, limit: float) -> Tensor:
    """Slots [N] with a pixel that is not finite, or more than `limit` of them at the boundary."""
    states = buffer.states.flatten(1)
    edge = (states <= bounds.low) | (states >= bounds.high)
    return ~states.isfinite().all(dim=1) | (edge.float().mean(dim=1) > limit)


def renew(buffer: ReplayBuffer, unhealthy: Tensor, rng: Generator) -> int:
    """Reinitialise the chains of these slots [N]; returns their number."""
    slots = unhealthy.nonzero().squeeze(1)
    if len(slots):
        y = slots * buffer.n_classes // buffer.options.capacity
        buffer.states[slots] = buffer.start.draw(len(slots), rng, y)
    return len(slots)
