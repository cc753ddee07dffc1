"""The sentinel: by which signs a run counts as sick, read from what training measures anyway."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from jemkit.errors import Diverged
from jemkit.options import Options

Remedy = Literal["rate", "steps", "penalty"]


class Sentinel(Options):
    """When a run counts as sick, and what is tried against it: the table [sentinel] of a recipe.

    Every threshold stands far outside of what healthy runs do. In 41 of digits no mean energy or
    gap was 26 nats from its median of 200 steps, while learning took each of them, in its first
    hundred steps, beyond 20 spreads: energies are logarithms of densities, so nats have a meaning
    of their own. Two that diverged passed 1e4 within three steps of their last usual one.
    """

    on: bool = True
    tries: int = Field(3, ge=0)  # times that a run may be rolled back
    policy: tuple[Remedy, ...] = Field(("rate", "rate", "steps"), min_length=1)  # try by try
    quiet: int = Field(100, ge=1)  # steps that prove a checkpoint healthy; an epoch at most
    window: int = Field(200, ge=20)  # steps that a median and a spread are taken over
    far: float = Field(20.0, gt=0)  # spreads from the median
    nats: float = Field(100.0, ge=0)  # and so far at least: below, it may be learning
    patience: int = Field(3, ge=1)  # steps in a row out there; one alone is an outlier
    steep: float = Field(1e3, gt=1)  # times the median of earlier epochs: slopes, batch variances
    stuck: float = Field(0.5, gt=0, lt=1)  # share at the range's edge, of pixels and of slots
    collapse: int = Field(2, ge=1)  # epochs in a row at chance; one may be a hiccup of batch norm

    def unused(self) -> dict[str, str]:
        rest = set(type(self).model_fields) - {"on"}
        if not self.on:
            return dict.fromkeys(sorted(rest), "while the sentinel is off")
        return {} if self.tries else {"policy": "where tries is 0"}

    def proof(self, per_epoch: int) -> int:
        """Steps that prove a checkpoint healthy: `quiet` of them, or an epoch."""
        return min(self.quiet, per_epoch)

    def late(self, per_epoch: int) -> int:
        """After how many steps a finding may still take a run back to a checkpoint."""
        return self.patience + (self.collapse - 1) * per_epoch + self.proof(per_epoch)


class Finding(NamedTuple):
    """A sign of sickness."""

    signal: str
    since: int  # the first step that it may have come from
    told: str


class Unhealthy(Diverged):
    """A finding, on its way to whoever rolls back."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.told)
        self.finding = finding


LEAST, EVERY = 20, 10
"""Steps before a spread is trusted, and between two estimates of it: by the step's number, not by
when metrics are gathered, so that a run finds the same however often it is interrupted."""


class Drift:
    """One signal against its own past, by a median and a spread that outliers do not move.

    Losses and energies of JEMs cross zero, so nothing is relative to a mean: the rule is the same
    for a signal plus a constant and, with `nats` 0, for a signal times one.
    """

    def __init__(self, options: Sentinel) -> None:
        self.options = options
        self.values: list[float] = []
        self.middle = self.spread = math.nan
        self.strays, self.since = 0, 0

    def reads(self, step: int, value: float) -> bool:
        """Take a finite value in; whether it is the last of `patience` strays in a row."""
        asked = self.options
        if len(self.values) >= LEAST and (step % EVERY == 0 or math.isnan(self.middle)):
            self.middle = statistics.median(self.values)
            off = statistics.median([abs(v - self.middle) for v in self.values])
            self.spread = 1.4826 * off  # a normal's standard deviation
        strays = abs(value - self.middle) > max(asked.far * self.spread, asked.nats)
        self.since = step if strays and not self.strays else self.since
        self.strays = self.strays + 1 if strays else 0
        self.values = [*self.values, value][-asked.window :]
        return self.strays >= asked.patience

    def state(self) -> Tensor:
        told = [self.middle, self.spread, self.strays, self.since]
        return torch.tensor([*told, *self.values], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        self.middle, self.spread, strays, since, *self.values = state.tolist()
        self.strays, self.since = int(strays), int(since)


class RunStatistics:
    """What the sentinel remembers of a run; part of its checkpoints."""

    def __init__(self, options: Sentinel) -> None:
        self.options = options
        self.drifts: dict[str, Drift] = {}
        self.levels: dict[str, list[float]] = {}  # of earlier epochs

    def row(self, row: Mapping[str, Any]) -> Finding | None:
        """A step's metrics: anything not finite, and energies and gaps that run away."""
        step = int(row["step"])
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                return Finding(name, step, f"not finite: {name} = {value}")
        for name, value in row.items():
            if not name.startswith(("E(", "gap ")):
                continue
            drift = self.drifts.setdefault(name, Drift(self.options))
            if drift.reads(step, value):
                told = (
                    f"{name} ran away: {value:.4g} at step {step}, where {drift.middle:.4g} give "
                    f"or take {drift.spread:.2g} was usual"
                )
                return Finding(name, drift.since, told)
        return None

    def level(self, name: str, value: float, since: int) -> Finding | None:
        """A size that an epoch ended with, against those of earlier epochs."""
        if not math.isfinite(value):
            return Finding(name, since, f"not finite: {name} = {value}")
        earlier = self.levels.get(name, [])
        self.levels[name] = [*earlier, value][-10:]
        usual = statistics.median(earlier) if len(earlier) > 2 else math.inf
        if 0 < usual * self.options.steep < value:
            told = f"the {name} grew to {value:.4g}, where {usual:.4g} was usual"
            return Finding(name, since, told)
        return None

    def accuracy(
        self, seen: Sequence[float], chance: float, images: int, since: int
    ) -> Finding | None:
        """The silent collapse: held-out accuracy at chance after it was clearly above.

        `seen` has every epoch's; both bounds are in standard deviations of a guess's accuracy.
        """
        noise = math.sqrt(chance * (1 - chance) / images)
        latest, earlier = seen[-self.options.collapse :], seen[: -self.options.collapse]
        if not earlier or max(earlier) <= chance + 6 * noise or max(latest) > chance + noise:
            return None
        told = (
            f"validation accuracy fell to chance: {seen[-1]:.1%}, where it had been "
            f"{max(earlier):.1%} and guessing gives {chance:.1%}"
        )
        return Finding("accuracy", since, told)

    def state_dict(self) -> dict[str, Any]:
        drifts = {name: drift.state() for name, drift in self.drifts.items()}
        return {"drifts": drifts, "levels": {n: list(v) for n, v in self.levels.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.levels = {name: list(values) for name, values in state["levels"].items()}
        self.drifts = {name: Drift(self.options) for name in state["drifts"]}
        for name, drift in self.drifts.items():
            drift.load(state["drifts"][name])
