"""A process that follows: it takes the steps that the first one of its group orders."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from jemkit.config.recipe import Recipe
from jemkit.errors import ConfigError, Diverged, JemkitError
from jemkit.runtime import distributed
from jemkit.runtime.precision import numerics
from jemkit.sampling.density import Penalised
from jemkit.step import train_step
from jemkit.training.build import build_run
from jemkit.training.health import HealthMonitor
from jemkit.training.leader import packed, unpacked
from jemkit.training.rollback import anew
from jemkit.training.synchronisation import broadcast_weights
from jemkit.training.trainer import Summary
from jemkit.updaters import Guard


def follow(recipe: Recipe, out: Path) -> Summary:
    """Do as the first process says until it says `end`; write nothing, judge nothing."""
    run = recipe.run
    me: Follower | None = None
    with numerics(precision=run.precision, deterministic=run.deterministic, threads=run.threads):
        while (order := _heard())["do"] != "end":
            if order["do"] == "build":
                me = _built(recipe)
            elif me is not None:
                me.obey(order)
    return Summary(out, run.epochs, 0, 0.0, [])


def _built(recipe: Recipe) -> "Follower | None":
    """None where the recipe cannot run: the first process finds the same, and says it."""
    try:
        return Follower(recipe)
    except ConfigError:
        return None


class Follower:
    """The parts of a run, without a loop of their own."""

    def __init__(self, recipe: Recipe) -> None:
        self.parts, self.guard = build_run(recipe), Guard()
        self.theta_steps, self.seed = recipe.run.theta_steps, recipe.run.seed
        self.checkup = HealthMonitor(recipe.sentinel, self.parts)

    def obey(self, order: dict[str, Any]) -> None:
        if order["do"] == "step":
            self.step(order)
        elif order["do"] == "weights":
            self.parts.weights()
        elif order["do"] == "state":
            self.parts.shared_state()
            distributed.gather(packed(self.parts.own_state()))
        elif order["do"] == "renew":
            count = anew(self.checkup, self.seed, order["attempt"])
            distributed.gather({"n": torch.tensor(count)})
        else:
            self.parts.take(unpacked(distributed.share(None)))
            self.guard = Guard()

    def step(self, order: dict[str, Any]) -> None:
        """The leader's step, on this process's rows; where it diverges it is as if not taken."""
        parts = self.parts
        for group in parts.optimizer.param_groups:
            group["lr"] = order["lr"]
        density = parts.backbone.density if parts.backbone.has_density else None
        if density is not None:
            density.steps = order["steps"]
        if isinstance(density, Penalised) and order["penalty"]:
            density.penalise(order["penalty"])
        before = parts.loader.state_dict()
        with distributed.together():
            broadcast_weights(parts)
            batch = parts.loader.batch()
            try:
                take = partial(
                    train_step, parts.backbone, parts.objective, parts.updater, batch, parts.rng,
                    self.guard, self.theta_steps,
                )  # fmt: skip
                parts.micro.fit(take)
            except Diverged:
                parts.loader.load_state_dict(before)
                return
        if parts.ema is not None:  # of weights in shares each process averages its own
            parts.ema.update(parts.backbone.model)


def _heard() -> dict[str, Any]:
    try:
        return distributed.heard()
    except RuntimeError as error:
        raise JemkitError(f"rank 0 was lost: {error}") from None
