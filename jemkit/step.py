"""One step of any objective on any backbone."""

from typing import Any

import torch
from torch import Generator

from jemkit.backbone import Backbone
from jemkit.data import Batch
from jemkit.objective import Objective, StatefulObjective, Terms
from jemkit.runtime import tensors
from jemkit.runtime.modes import seeded_random_state
from jemkit.sampling.reports import reports
from jemkit.updaters import Guard, StepAware, Updater, pooled


def seeded_step(seed: Generator, *step: Any) -> Terms:
    """`train_step`, for which torch's global generators are seeded: dropout draws from them."""
    with seeded_random_state(seed):
        return train_step(*step)


def train_step(
    backbone: Backbone,
    objective: Objective[Any],
    updater: Updater,
    batch: Batch,
    rng: Generator,
    guard: Guard,
    theta_steps: int = 1,
) -> Terms:
    """Draw once, then update the weights `theta_steps` times (M_theta) on the same draws.

    A step is a transaction: if it fails, buffer, generator and batch norm are restored. With
    several updates, those before the failing one are kept.
    """
    before = rng.get_state()
    buffers = list(backbone.model.buffers())
    statistics = tensors.cloned(buffers)
    density = backbone.density_or_none
    if density is not None:
        density.mark()
    evaluated: list[Terms] = []
    try:
        with reports() as reported:
            draws = objective.draw(backbone, batch, rng)

        def terms() -> Terms:
            evaluated.append(objective.loss(backbone, batch, draws))
            backbone.check_learning(backbone.scored_streams)
            return evaluated[-1]

        if isinstance(updater, StepAware):
            updater.begin(backbone, batch)
        for _ in range(theta_steps):
            updater.step(terms, guard)
    except BaseException:
        if density is not None:
            density.rollback()
        rng.set_state(before)
        tensors.copy(buffers, statistics)
        updater.optimizer.zero_grad()
        raise
    if isinstance(objective, StatefulObjective):
        objective.after(backbone, batch, draws, rng)
    means = {name: torch.stack(values).mean() for name, values in reported.items()}
    return pooled(evaluated[0]._replace(watched={**evaluated[0].watched, **means}), backbone.model)
