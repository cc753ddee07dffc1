"""Rollback: an unhealthy run returns to a healthy checkpoint and continues with a remedy."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

from jemkit.config.recipe import Recipe
from jemkit.data import Loader
from jemkit.errors import DataError, Diverged, OutOfMemory
from jemkit.runtime import checkpoint, distributed
from jemkit.runtime.divergence_monitor import Finding, Remedy, Sentinel, Unhealthy
from jemkit.runtime.rng import generator
from jemkit.runtime.run_dir import RunFolder
from jemkit.sampling.density import Penalised, penalty_of
from jemkit.training.build import RunState
from jemkit.training.health import HealthMonitor, renew, sick_slots
from jemkit.training.metrics_log import Journal
from jemkit.updaters import Guard

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
        learns = parts.objective.needs_density
        self.chains = parts.backbone.density_or_none if learns else None  # that it draws from
        self._steps = self.chains.steps if self.chains else 0
        self._epoch = parts.loader.steps_per_epoch

    @property
    def may_try(self) -> bool:
        return self.options.on and len(self.tried) < self.options.tries

    @property
    def rate(self) -> float:
        """The factor on the learning rate."""
        return float(0.5 ** self._times("rate"))

    def proven(self, folder: Path, since: int) -> Iterator[Path]:
        """Checkpoints after which `quiet` steps, or an epoch, raised no finding; newest first.

        Only ends of epochs, and the start, count, since every run has those however often it was
        interrupted.
        """
        for path in reversed(checkpoint.complete(folder)):
            step = step_of(path)
            if step == 0 or (
                step % self._epoch == 0 and step + self.options.proof(self._epoch) <= since
            ):
                yield path

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
        (entry["renewed"],) = distributed.total(reseed_chains(self.monitor, self.seed, attempt))
        self.apply_remedies([*self.tried, entry])
        entry["with"] = self.continued_with()
        return entry

    def apply_remedies(self, tried: list[dict[str, Any]]) -> None:
        """Apply the remedies of these attempts."""
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
        """The next remedy of the policy that changes anything; its last serves all later attempts.
        If none does, the learning rate is lowered, which is always possible."""
        policy = self.options.policy
        left = policy[min(attempt, len(policy)) - 1 :]
        return next((remedy for remedy in left if self._changes(remedy)), "rate")

    def _changes(self, remedy: Remedy) -> bool:
        """Whether a remedy would change anything."""
        if remedy == "rate":
            return True
        if remedy == "steps":
            return self.chains is not None and self.chains.steps > 0
        lighter = penalty_of(self.chains) < PENALTY and not self._times("penalty")
        return isinstance(self.chains, Penalised) and lighter

    def _times(self, remedy: Remedy) -> int:
        return sum(entry["remedy"] == remedy for entry in self.tried)

    def state_dict(self) -> dict[str, Any]:
        return {"tried": self.tried, "vitals": self.monitor.vitals.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.monitor.vitals.load_state_dict(state["vitals"])
        self.apply_remedies(state["tried"])


def reseed_chains(monitor: HealthMonitor, seed: int, attempt: int) -> int:
    """Give this process's chains another stream and restart its unhealthy ones; returns their
    number."""
    parts, buffer, rank = monitor.parts, monitor.buffer, distributed.shard().rank
    words = ("chains", "attempt", attempt, *([rank] if rank else []))
    parts.rng.set_state(generator(parts.device, seed, *words).get_state())
    if buffer is None:
        return 0
    return renew(buffer, sick_slots(buffer, parts.task.bounds, monitor.limit), parts.rng)


class Recoverable(Protocol):
    """The parts of a trainer that a rollback restores."""

    best: dict[str, Any]
    guard: Guard
    journal: Journal
    rollback: RollbackPolicy
    loader: Loader
    recipe: Recipe
    folder: RunFolder
    writer: checkpoint.Writer
    watch: Callable[[str, dict[str, Any]], None]

    @property
    def seconds(self) -> float: ...

    @property
    def step(self) -> int: ...

    def gather(self) -> object: ...

    def save(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def roll_back(trainer: Recoverable, error: Diverged) -> None:
    """Roll a run back to a healthy checkpoint, or raise Diverged.

    The rolled-back state is saved in place of that checkpoint, and later checkpoints are deleted;
    the best epoch is kept, whichever attempt it is from.
    """
    distributed.on_rank_zero(trainer.writer.wait)
    policy, folder, step = trainer.rollback, trainer.folder, trainer.step
    finding = _earliest(trainer, error)
    name, state = distributed.on_rank_zero(
        lambda: _readable(policy.proven(folder.checkpoints, finding.since))
    )
    cause = None if policy.options.on else "the sentinel is off"
    if not trainer.loader.images.unit().isfinite().all():
        cause = SPOILT
    if state is None or cause or not policy.may_try:
        distributed.on_rank_zero(lambda: _give_up(trainer, finding, name, cause))
    tried, best, seconds = policy.tried, trainer.best, trainer.seconds
    trainer.load_state_dict(state)
    trainer.best, trainer.journal.seconds, trainer.guard = best, seconds, Guard()
    policy.apply_remedies(tried)
    entry = policy.try_next(finding, step, trainer.step)
    rolled_back = trainer.state_dict()

    def put_back() -> None:
        for path in reversed(checkpoint.complete(folder.checkpoints)):
            if path.name > name:  # newest first: a run killed here repeats the rollback
                checkpoint.remove(path)
        checkpoint.save(folder.checkpoints / name, rolled_back)
        folder.drop_metrics_from(trainer.step)
        folder.event("rollback", **entry)

    distributed.on_rank_zero(put_back)
    trainer.watch("rollback", entry)


def _give_up(trainer: Recoverable, finding: Finding, name: str, cause: str | None) -> NoReturn:
    folder = trainer.folder
    where = folder.checkpoints / name if name else None
    where = checkpoint.newest(folder.checkpoints) if cause else where
    tried = trainer.rollback.tried
    folder.event("diverged", step=trainer.step, reason=finding.message, tried=tried)
    raise Diverged(diagnosis(finding, trainer.step, trainer, where, cause))


def saved(trainer: Recoverable, error: OutOfMemory) -> NoReturn:
    """End a run that ran out of memory, once its state is saved."""
    message = str(error)
    if error.undone:
        try:
            trainer.save()
            distributed.on_rank_zero(trainer.writer.wait)  # before any process ends
        except Diverged as sick:  # of its last steps; the checkpoint to roll back to is saved
            roll_back(trainer, sick)
        message += f". Step {trainer.step} is saved; --resume continues from it with more memory"
        distributed.on_rank_zero(lambda: _end(trainer, message, undone=True))
    _end(trainer, message, undone=False)


def _end(trainer: Recoverable, message: str, *, undone: bool) -> NoReturn:
    if distributed.shard().rank == 0:
        trainer.folder.event("memory", step=trainer.step, ended=message)
    raise OutOfMemory(message, undone=undone) from None


def _earliest(trainer: Recoverable, error: Diverged) -> Finding:
    """A finding in metrics that were not read yet takes precedence over the error."""
    try:
        trainer.gather()
    except Unhealthy as earlier:
        return earlier.finding
    if isinstance(error, Unhealthy):
        return error.finding
    message = re.sub(r"^update \d+: ", "", str(error))  # counted again in every process
    return Finding("update", trainer.step, message)


def diagnosis(
    finding: Finding, step: int, trainer: Recoverable, where: Path | None, cause: str | None
) -> str:
    """What was detected and since when, what was tried, and what to do, as a short list.

    The initial weights are not suggested, since the run diverged from them.
    """
    tried, policy = trainer.rollback.tried, trainer.rollback
    head = f"diverged at step {step}: {finding.message} (since step {finding.since})"
    lines = [f"{len(tried) - SHOWN} attempts before these: see events.jsonl"] * (len(tried) > SHOWN)
    for entry in tried[-SHOWN:]:
        back = f"rolled back from step {entry['step']} to {entry['to']}"
        lines.append(
            f"attempt {entry['attempt']} {back}, continued with {entry['with']}: {entry['what']}"
        )
    if cause != SPOILT:
        rate = trainer.recipe.optimizer.lr * policy.rate
        lines.append(f"start a new run with optimizer.lr below {rate:.3g}, or a longer warm-up")
        if policy.chains is not None:
            lighter = penalty_of(policy.chains) < PENALTY
            penalty = f" or backbone.density.penalty = {PENALTY}" if lighter else ""
            lines[-1] += f", more backbone.steps{penalty}"
    if where is not None and step_of(where) > 0:
        lines.append(f"--init-from {where} starts from its weights, of step {step_of(where)}")
    return "\n  - ".join([f"{head}; {cause}" if cause else head, *lines])


def _readable(paths: Iterator[Path]) -> tuple[str, dict[str, Any] | None]:
    """The name of the first that is not damaged, and its state."""
    for path in paths:
        with suppress(DataError):
            return path.name, checkpoint.load(path)
    return "", None


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
