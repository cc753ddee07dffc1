"""Rollback: an unhealthy run returns to a healthy checkpoint and continues with a remedy."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Generator

from jemkit.errors import DataError
from jemkit.objective import SetsChainSteps
from jemkit.runtime import checkpoint, distributed
from jemkit.runtime.divergence_monitor import Finding, Remedy, Sentinel
from jemkit.runtime.rng import generator
from jemkit.sampling.density import Penalised, penalty_of
from jemkit.training.build import RunState
from jemkit.training.health import HealthMonitor, renew, unhealthy_slots

PENALTY = 0.1
"""Weight of the penalty on squared mean energies, as recommended to users of JEM whose runs
diverge."""

SPOILT = "the training images are not finite, so a rollback would not help"
SHOWN = 3
"""Attempts that a message lists."""


class RollbackPolicy:
    """The attempts of a run so far, and the checkpoints for a rollback; part of its checkpoints."""

    def __init__(self, options: Sentinel, parts: RunState, seed: int) -> None:
        self.options, self.parts, self.seed = options, parts, seed
        self.monitor = HealthMonitor(options, parts)
        self.tried: list[dict[str, Any]] = []  # one entry per rollback
        self.chains = self.monitor.chains
        own = parts.objective
        self.sets_steps = isinstance(own, SetsChainSteps) and own.sets_chain_steps
        self._steps = self.chains.steps if self.chains else 0
        self._epoch = parts.loader.steps_per_epoch

    @property
    def may_try(self) -> bool:
        return self.options.on and len(self.tried) < self.options.tries

    @property
    def obstacle(self) -> str | None:
        """Why no rollback is possible or would help; None if one may."""
        images = self.parts.loader.images.x
        if images.is_floating_point() and not images.isfinite().all():
            return SPOILT
        return None if self.options.on else "the sentinel is off"

    @property
    def rate(self) -> float:
        return float(0.5 ** self._times("rate"))

    def proven(self, folder: Path, since: int) -> Iterator[Path]:
        """Checkpoints after which `quiet` steps, or an epoch, raised no finding; newest first.

        Only the start and ends of epochs count: a run has them however often it is interrupted.
        """
        for path in reversed(checkpoint.complete(folder)):
            step = step_of(path)
            if step == 0 or (
                step % self._epoch == 0 and step + self.options.proof(self._epoch) <= since
            ):
                yield path

    def newest_proven(self, folder: Path, since: int) -> tuple[str, dict[str, Any] | None]:
        """The name of the newest of these that is not damaged, and its state."""
        for path in self.proven(folder, since):
            with suppress(DataError):
                return path.name, checkpoint.load(path)
        return "", None

    def prune(self, folder: Path, step: int, keep: int) -> None:
        """Keep the newest `keep`, and those that a later finding may roll back to."""
        checkpoints = checkpoint.complete(folder)
        oldest = max(0, (step - self.options.late(self._epoch)) // self._epoch * self._epoch)
        for path in checkpoints[:-keep]:
            wanted = step_of(path) >= oldest and step_of(path) % self._epoch == 0
            if not (self.options.on and wanted):
                checkpoint.remove(path)
        checkpoint.prune(folder, len(checkpoints))

    def try_next(self, finding: Finding, step: int, back: int) -> dict[str, Any]:
        """Apply the next remedy, give the chains another seed, and restart the unhealthy ones."""
        attempt = len(self.tried) + 1
        entry: dict[str, Any] = {
            "attempt": attempt, "of": self.options.tries, "signal": finding.signal,
            "what": finding.message, "step": step, "since": finding.since, "to": back,
            "remedy": self._remedy(attempt), "renewed": 0,
        }  # fmt: skip
        (entry["renewed"],) = distributed.total(self._reseed_chains(attempt))
        self.apply_remedies([*self.tried, entry])
        entry["with"] = self.continued_with()
        return entry

    def stream(self, what: str, step: int) -> Generator:
        """A random stream of this process for a step, another one in every attempt."""
        words = (what, step, len(self.tried), distributed.shard().rank)
        return generator(self.parts.device, self.seed, *words)

    def _reseed_chains(self, attempt: int) -> int:
        """Give this process's chains another stream; restart the unhealthy and count them."""
        monitor, parts, rank = self.monitor, self.parts, distributed.shard().rank
        words = ("chains", "attempt", attempt, *([rank] if rank else []))
        parts.rng.set_state(generator(parts.device, self.seed, *words).get_state())
        buffer = monitor.buffer
        if buffer is None:
            return 0
        return renew(buffer, unhealthy_slots(buffer, parts.task.bounds, monitor.limit), parts.rng)

    def apply_remedies(self, tried: list[dict[str, Any]]) -> None:
        self.tried = list(tried)
        if self.chains is None:
            return
        self.chains.steps = self._steps * 2 ** self._times("steps")
        if self._times("penalty") and isinstance(self.chains, Penalised):
            self.chains.penalise(PENALTY)

    def continued_with(self) -> str:
        """With what a rolled-back run continues, as text."""
        words = [f"{self.rate:g} times the learning rate"] if self._times("rate") else []
        if self._times("steps") and self.chains is not None:
            words.append(f"{self.chains.steps} steps per chain")
        if self._times("penalty"):
            words.append(f"an energy penalty of {penalty_of(self.chains) or PENALTY:g}")
        return ", ".join(words)

    def _remedy(self, attempt: int) -> Remedy:
        """The next remedy of the policy that changes anything, or the last; else the rate."""
        policy = self.options.policy
        left = policy[min(attempt, len(policy)) - 1 :]
        return next((remedy for remedy in left if self._changes(remedy)), "rate")

    def _changes(self, remedy: Remedy) -> bool:
        if remedy == "rate":
            return True
        if remedy == "steps":
            return self.chains is not None and self.chains.steps > 0 and not self.sets_steps
        lighter = penalty_of(self.chains) < PENALTY and not self._times("penalty")
        return isinstance(self.chains, Penalised) and lighter

    def _times(self, remedy: Remedy) -> int:
        return sum(entry["remedy"] == remedy for entry in self.tried)

    def state_dict(self) -> dict[str, Any]:
        return {"tried": self.tried, "vitals": self.monitor.statistics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.monitor.statistics.load_state_dict(state["vitals"])
        self.apply_remedies(state["tried"])


def diagnosis(
    finding: Finding, step: int, policy: RollbackPolicy, rate: float, where: Path | None,
    cause: str | None,
) -> str:  # fmt: skip
    """What was detected and since when, what was tried, and what to do, as a short list.

    `rate` is the learning rate of the recipe, and `where` the checkpoint to start from. The initial
    weights are not suggested, since the run diverged from them.
    """
    tried = policy.tried
    head = f"diverged at step {step}: {finding.message} (since step {finding.since})"
    lines = [f"{len(tried) - SHOWN} attempts before these: see events.jsonl"] * (len(tried) > SHOWN)
    for entry in tried[-SHOWN:]:
        back = f"rolled back from step {entry['step']} to {entry['to']}"
        lines.append(
            f"attempt {entry['attempt']} {back}, continued with {entry['with']}: {entry['what']}"
        )
    if cause != SPOILT:
        below = f"optimizer.lr below {rate * policy.rate:.3g}"
        lines.append(f"start a new run with {below}, or a longer warm-up")
        if policy.chains is not None:
            lighter = isinstance(policy.chains, Penalised) and penalty_of(policy.chains) < PENALTY
            penalty = f" or backbone.density.penalty = {PENALTY}" if lighter else ""
            lines[-1] += ("" if policy.sets_steps else ", more backbone.steps") + penalty
    if where is not None and step_of(where) > 0:
        lines.append(f"--init-from {where} starts from its weights, of step {step_of(where)}")
    return "\n  - ".join([f"{head}; {cause}" if cause else head, *lines])


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
