"""The options of LAS-AT."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Generator

from jemkit import (
    WRN, Ball, NetworkPart, Objective, ObjectiveSpec, Options, PartOf, Plain, Radius, Task,
    UpdaterSpec, hookimpl, radius_of,
)  # fmt: skip
from jemkit_plugins.lasat.forms import FORMS, Form, FormName
from jemkit_plugins.lasat.objective import LASATObjective
from jemkit_plugins.lasat.strategy import built

Sizes = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class LASAT(Options):
    """CE(x~) with radius, number of steps and step size chosen per image by a strategy.

    The strategy is trained by REINFORCE: its reward is the loss of x~, plus the accuracies of the
    model after one SGD step on them. Options that are None have the values of the form
    (`forms.py`), with sizes scaled to the radius. "trades" also chooses the weight of the
    divergence. "awp" projects x~ onto the radius at the end, and is meant for the updater awp.
    """

    needs_density: ClassVar[bool] = False
    norm: ClassVar[Ball] = "Linf"

    form: FormName = "at"  # the method that the strategy is added to
    radius_px: Radius | None = None  # of the start, and of the reward's PGD; None: the data set's
    eps_px: Sizes | None = None  # radii to choose from
    iterations: Counts | None = None  # numbers of steps to choose from
    step_px: Sizes | None = None  # step sizes to choose from
    beta: Sizes | None = None  # weights of the divergence to choose from
    smoothing: float = Field(0.3, ge=0, le=0.5)  # of the labels of "at", over the other classes
    every: int | None = Field(None, ge=1)  # steps from one update of the strategy to the next
    robust: float | None = Field(None, ge=0)  # weights of the accuracies in the reward
    clean: float | None = Field(None, ge=0)  # the same of clean images
    baseline: Literal["none", "ema"] = "none"  # what the reward is compared with
    strategy: NetworkPart = WRN(depth=16, width=4)  # the recipe objective/lasat sets the paper's
    strategy_lr: float = Field(1e-4, gt=0)  # learning rate of the strategy
    update: Annotated[UpdaterSpec, PartOf("updater")] = Plain()  # of the reward's step

    def unused(self) -> dict[str, str]:
        reasons = {} if self.form == "at" else {"smoothing": 'unless form = "at"'}
        return reasons if self.form == "trades" else {**reasons, "beta": 'unless form = "trades"'}

    def build(self, task: Task, rng: Generator) -> Objective[Any]:
        radius = radius_of("Linf", self.radius_px, task.radius_px, "objective.radius_px")
        given = {name: getattr(self, name, None) for name in Form._fields}
        form = FORMS[self.form].scaled(radius)
        form = form._replace(**{k: v for k, v in given.items() if v is not None})
        names = ("eps_px", "iterations", "step_px", *(("beta",) if self.form == "trades" else ()))
        choices = {name: getattr(form, name) for name in names}
        strategy = built(task, rng, self.strategy, choices, momentum=form.momentum > 0)
        return LASATObjective(self, form, radius, task, strategy)


@hookimpl
def jemkit_objectives() -> Mapping[str, type[ObjectiveSpec]]:
    return {"lasat": LASAT}
