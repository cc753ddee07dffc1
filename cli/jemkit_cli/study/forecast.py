"""A forecast of the time of a study's missing runs, from a few measured training steps."""

import math
import time
from collections.abc import Sequence
from typing import Any

from jemkit.metrics import record as records
from jemkit.runtime.precision import numerics
from jemkit.runtime.timing import settle
from jemkit.step import train_step
from jemkit.training.build import build_run
from jemkit.updaters import Guard
from jemkit_cli.study.plan import Study, Unit
from jemkit_cli.study.running import state_of

STEPS = 3
"""Number of timed training steps of a recipe, after one that is not timed."""


def forecast(study: Study, units: Sequence[Unit], jobs: int) -> list[dict[str, Any]]:
    """A line for each run with the seconds of its training and evaluation, and a total.

    The seconds of an evaluation are taken from runs that are already evaluated; None if there are
    none.
    """
    states = {unit.key: state_of(unit) for unit in units}
    complete = [unit for unit in units if states[unit.key].evaluated == study.evaluate]
    known = [_evaluation_seconds(unit) for unit in complete]
    evaluation = sum(known) / len(known) if known else None
    training: dict[str, float] = {}
    lines = []
    for unit in units:
        state = states[unit.key]
        done = state.complete(study.evaluate)
        if state.trained is None and unit.row.name not in training:
            training[unit.row.name] = _training_seconds(unit)
        lines.append({
            "row": unit.row.name,
            "seed": unit.seed,
            "run": str(unit.folder),
            "training, s": 0 if state.trained else math.ceil(training[unit.row.name]),
            "evaluation, s": 0 if done else evaluation and math.ceil(evaluation),
        })  # fmt: skip
    total: dict[str, Any] = {"row": "total", "seed": None, "run": f"{jobs} at a time"}
    for name in ("training, s", "evaluation, s"):
        each: list[Any] = [line[name] for line in lines]
        total[name] = None if None in each else math.ceil(sum(each) / jobs)
    return [*lines, total]


def _training_seconds(unit: Unit) -> float:
    """The time of all steps of the run at the rate of a few, without validation and checkpoints."""
    recipe = unit.resolved.recipe
    parts = build_run(recipe)
    with numerics(
        precision=recipe.run.precision, deterministic=recipe.run.deterministic,
        threads=recipe.run.threads,
    ):  # fmt: skip
        guard, began = Guard(), 0.0
        for step in range(STEPS + 1):
            if step == 1:
                settle(parts.device)
                began = time.perf_counter()
            train_step(
                parts.backbone, parts.objective, parts.updater, parts.loader.batch(), parts.rng,
                guard, recipe.run.theta_steps,
            )  # fmt: skip
        settle(parts.device)
        taken = time.perf_counter() - began
        guard.settle()
    return taken / STEPS * parts.task.total_steps


def _evaluation_seconds(unit: Unit) -> float:
    """The total time of the evaluators of a record."""
    record = records.load(unit.folder)
    seconds = {(f.protocol.get("evaluator"), f.protocol.get("seconds", 0)) for f in record.figures}
    return float(sum(each for _, each in seconds))
