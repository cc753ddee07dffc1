"""The sentinel: signs of an unhealthy run, computed from the metrics of training."""

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
    """When a run counts as unhealthy, and which remedies are tried: the table [sentinel].

    Every threshold is far outside the range of healthy runs. In 41 runs on digits no mean energy or
    gap was 26 nats from the median of its last 200 steps, while in the first hundred steps learning
    took each of them beyond 20 spreads. Energies are logarithms of densities, so nats are an
    absolute scale. Two runs that diverged passed 1e4 within three steps of their last normal one.
    """

    on: bool = True  # watch the run
    tries: int = Field(3, ge=0)  # number of rollbacks before the run ends
    # one remedy per attempt
    policy: tuple[Remedy, ...] = Field(("rate", "rate", "steps"), min_length=1)
    quiet: int = Field(100, ge=1)  # steps that prove a checkpoint healthy; an epoch at most
    window: int = Field(200, ge=20)  # steps for the median and the spread
    far: float = Field(20.0, gt=0)  # spreads from the median
    nats: float = Field(100.0, ge=0)  # and at least so many nats: below, it may be learning
    patience: int = Field(3, ge=1)  # consecutive steps outside; a single one is an outlier
    # times the median of earlier epochs: gradient norms, batch variances
    steep: float = Field(1e3, gt=1)
    # share of pixels, and of slots, at the boundary of the range
    stuck: float = Field(0.5, gt=0, lt=1)
    # consecutive epochs at chance; a single one may be due to batch norm
    collapse: int = Field(2, ge=1)

    def unused(self) -> dict[str, str]:
        rest = set(type(self).model_fields) - {"on"}
        if not self.on:
            return dict.fromkeys(sorted(rest), "while the sentinel is off")
        return {} if self.tries else {"policy": "where tries is 0"}

    def proof(self, per_epoch: int) -> int:
        """Steps after which a checkpoint counts as healthy: `quiet` of them, or an epoch."""
        return min(self.quiet, per_epoch)

    def late(self, per_epoch: int) -> int:
        """The number of steps within which a finding may still roll a run back to a checkpoint."""
        return self.patience + (self.collapse - 1) * per_epoch + self.proof(per_epoch)


class Finding(NamedTuple):
    """A sign of an unhealthy run."""

    signal: str
    since: int  # the first step that may have caused it
    message: str


class Unhealthy(Diverged):
    """A finding, raised to trigger a rollback."""

    @property
    def finding(self) -> Finding:
        return Finding(*self.args)

    def __str__(self) -> str:
        return self.finding.message


LEAST, EVERY = 20, 10
"""Steps before a spread is trusted, and between two estimates of it.

The step number decides, not when metrics are read, so that interruptions change nothing.
"""


class Drift:
    """One signal compared with its past, by a median and a spread that are robust to outliers.

    Losses and energies of JEMs cross zero, so nothing is relative to a mean: the rule is the same
    for a signal plus a constant and, with `nats` 0, for a signal times one.
    """

    def __init__(self, options: Sentinel) -> None:
        self.options = options
        self.values: list[float] = []
        self.middle = self.spread = math.nan
        self.strays, self.since = 0, 0

    def reads(self, step: int, value: float) -> bool:
        """Add a finite value; whether it is the last of `patience` consecutive outliers."""
        options = self.options
        if len(self.values) >= LEAST and (step % EVERY == 0 or math.isnan(self.middle)):
            self.middle = statistics.median(self.values)
            off = statistics.median([abs(v - self.middle) for v in self.values])
            self.spread = 1.4826 * off  # the standard deviation of a normal distribution
        strays = abs(value - self.middle) > max(options.far * self.spread, options.nats)
        self.since = step if strays and not self.strays else self.since
        self.strays = self.strays + 1 if strays else 0
        self.values = [*self.values, value][-options.window :]
        return self.strays >= options.patience

    def state(self) -> Tensor:
        statistics = [self.middle, self.spread, self.strays, self.since]
        return torch.tensor([*statistics, *self.values], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        self.middle, self.spread, strays, since, *self.values = state.tolist()
        self.strays, self.since = int(strays), int(since)


class RunStatistics:
    """The sentinel's statistics of a run; part of its checkpoints."""

    def __init__(self, options: Sentinel) -> None:
        self.options = options
        self.drifts: dict[str, Drift] = {}
        self.levels: dict[str, list[float]] = {}  # of earlier epochs

    def row(self, row: Mapping[str, Any]) -> Finding | None:
        """Check a step's metrics: not finite values, and energies and gaps that run away."""
        step = int(row["step"])
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                return Finding(name, step, f"not finite: {name} = {value}")
        for name, value in row.items():
            if not name.startswith(("E(", "gap ")):
                continue
            drift = self.drifts.setdefault(name, Drift(self.options))
            if drift.reads(step, value):
                usual = f"{drift.middle:.4g} +- {drift.spread:.2g} was usual"
                message = f"{name} diverged: {value:.4g} at step {step}, where {usual}"
                return Finding(name, drift.since, message)
        return None

    def level(self, name: str, value: float, since: int) -> Finding | None:
        """Compare a statistic at the end of an epoch with its values in earlier epochs."""
        if not math.isfinite(value):
            return Finding(name, since, f"not finite: {name} = {value}")
        earlier = self.levels.get(name, [])
        self.levels[name] = [*earlier, value][-10:]
        usual = statistics.median(earlier) if len(earlier) > 2 else math.inf
        if 0 < usual * self.options.steep < value:
            message = f"the {name} grew to {value:.4g}, where {usual:.4g} was usual"
            return Finding(name, since, message)
        return None

    def accuracy(
        self, accuracies: Sequence[float], chance: float, images: int, since: int
    ) -> Finding | None:
        """Silent collapse: validation accuracy at chance after it was clearly above.

        `accuracies` are those of all epochs; the bounds are in standard deviations of guessing.
        """
        noise = math.sqrt(chance * (1 - chance) / images)
        latest, earlier = accuracies[-self.options.collapse :], accuracies[: -self.options.collapse]
        if not earlier or max(earlier) <= chance + 6 * noise or max(latest) > chance + noise:
            return None
        before = f"after {max(earlier):.1%} and guessing gives {chance:.1%}"
        message = f"validation accuracy fell to chance: {accuracies[-1]:.1%}, {before}"
        return Finding("accuracy", since, message)

    def state_dict(self) -> dict[str, Any]:
        drifts = {name: drift.state() for name, drift in self.drifts.items()}
        return {"drifts": drifts, "levels": {n: list(v) for n, v in self.levels.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.levels = {name: list(values) for name, values in state["levels"].items()}
        self.drifts = {name: Drift(self.options) for name in state["drifts"]}
        for name, drift in self.drifts.items():
            drift.load(state["drifts"][name])
