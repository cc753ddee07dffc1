"""A forecast of the time of a study's missing runs, from a few measured training steps."""

import math
import time
from collections.abc import Sequence
from typing import Any

from jemkit.config.recipe import Recipe
from jemkit.data import steps_per_epoch
from jemkit.errors import ConfigError, DataError
from jemkit.metrics import record as records
from jemkit.runtime.precision import numerics
from jemkit.runtime.timing import settle
from jemkit.step import train_step
from jemkit.training.build import build_run
from jemkit.updaters import Guard
from jemkit_cli.study.plan import Study, Unit
from jemkit_cli.study.running import State, state_of

STEPS = 3
"""Number of timed training steps of a recipe, after one that is not timed."""

FEW, SLOW = 8, 10.0
"""Images of a first step, and the seconds of a step from which on no other is timed."""


def forecast(study: Study, units: Sequence[Unit], jobs: int) -> list[dict[str, Any]]:
    """A line for each run with the seconds of its training and evaluation, and a total.

    The seconds of an evaluation are taken from runs that are already evaluated; None if there are
    none. A row that cannot run has the reason as `problem`.
    """
    states = {unit.key: state_of(unit) for unit in units}
    complete = [unit for unit in units if _is_evaluated(unit, states[unit.key], study)]
    known = [_evaluation_seconds(unit) for unit in complete]
    evaluation = sum(known) / len(known) if known else None
    training: dict[str, float | None] = {}
    problems: dict[str, str] = {}
    lines: list[dict[str, Any]] = []
    for unit in units:
        state = states[unit.key]
        done = state.complete(study.evaluations(unit.row))
        if state.trained is None and unit.row.name not in training:
            try:
                training[unit.row.name] = _training_seconds(unit)
            except (ConfigError, DataError) as error:
                training[unit.row.name], problems[unit.row.name] = None, str(error)
        lines.append({
            "row": unit.row.name,
            "seed": unit.seed,
            "run": str(unit.folder),
            "training, s": 0 if state.trained else _whole(training[unit.row.name]),
            "evaluation, s": 0 if done else _whole(evaluation),
        })  # fmt: skip
    for line in lines if problems else []:
        line["problem"] = problems.get(line["row"], "")
    total: dict[str, Any] = {"row": "total", "seed": None, "run": f"{jobs} at a time"}
    for name in ("training, s", "evaluation, s"):
        each: list[Any] = [line[name] for line in lines]
        total[name] = None if None in each else math.ceil(sum(each) / jobs)
    if problems:
        total["problem"] = f"{len(problems)} rows cannot run"
    return [*lines, total]


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else math.ceil(seconds)


def _is_evaluated(unit: Unit, state: State, study: Study) -> bool:
    return not state.diverged and state.complete(study.evaluations(unit.row))


def _training_seconds(unit: Unit) -> float:
    """The time of all steps of the run at the rate of a few, without validation and checkpoints.

    Where steps are slow, one of few images is timed: time is linear in the batch size.
    """
    recipe = unit.resolved.recipe
    run = recipe.run
    few = min(run.batch_size, FEW)
    seconds, n_train = _step_seconds(recipe, few, 1)
    seconds *= run.batch_size / few
    if few < run.batch_size and seconds < SLOW:
        seconds, _ = _step_seconds(recipe, run.batch_size, STEPS)
    return seconds * steps_per_epoch(n_train, run.batch_size, mixed=recipe.extra.on) * run.epochs


def _step_seconds(recipe: Recipe, batch_size: int, steps: int) -> tuple[float, int]:
    """The time of a step, and the number of training images.

    On a busy machine the processor time of a single thread is the shorter one.
    """
    run = recipe.run.model_copy(update={"batch_size": batch_size})
    parts = build_run(recipe.model_copy(update={"run": run}))
    with numerics(precision=run.precision, deterministic=run.deterministic, threads=run.threads):
        guard, began, used = Guard(), 0.0, 0.0
        for step in range(steps + 1):
            if step == 1:
                settle(parts.device)
                began, used = time.perf_counter(), time.process_time()
            train_step(
                parts.backbone, parts.objective, parts.updater, parts.loader.batch(), parts.rng,
                guard, run.theta_steps,
            )  # fmt: skip
        settle(parts.device)
        taken, used = time.perf_counter() - began, time.process_time() - used
        guard.settle()
    single = parts.device.type == "cpu" and run.threads == 1
    return (min(taken, used) if single else taken) / steps, parts.task.n_train


def _evaluation_seconds(unit: Unit) -> float:
    """The total time of the evaluators of a record."""
    record = records.load(unit.folder)
    seconds = {(f.protocol.get("evaluator"), f.protocol.get("seconds", 0)) for f in record.figures}
    return float(sum(each for _, each in seconds))
