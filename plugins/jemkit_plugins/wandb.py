"""The tracker wandb: Weights & Biases."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from jemkit import (
    ConfigError, Figures, Options, ScalarTracker, Status, TrackedRun, Tracker, TrackerSpec,
    hookimpl,
)  # fmt: skip
from jemkit.runtime.extras import install

CODES: Mapping[Status, int] = {"finished": 0, "failed": 1, "preempted": 5}
"""Exit codes; all but 0 are shown as failed."""


class Reporter(ScalarTracker):
    """Logs every figure against the column `step`, so that repeated steps are accepted."""

    def __init__(self, wandb: Any, options: "WandB") -> None:
        self.wandb, self.options = wandb, options

    def on_begin(self, run: TrackedRun) -> None:
        known = str(run.stored.get("id", ""))
        self.run = self.wandb.init(
            project=self.options.project,
            entity=self.options.entity,
            name=run.folder.name,
            id=known if re.fullmatch(r"[\w-]{1,64}", known) else None,
            resume="allow",
            config=run.recipe,
            dir=str(run.folder),
            mode=self.options.mode,
            settings=self.wandb.Settings(console="off"),
        )
        run.store({"id": self.run.id})
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Figures) -> None:
        self.run.log({"step": step, **figures})

    def on_end(self, status: Status) -> None:
        self.run.finish(exit_code=CODES[status])


class WandB(Options):
    """A run of Weights & Biases, with the settings of the recipe."""

    project: str = "jemkit"  # the project's name on the server
    entity: str | None = None  # user or team; None: the account's own
    mode: Literal["online", "offline"] | None = None  # None: WANDB_MODE, or online

    def build(self) -> Tracker:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"the tracker wandb needs the package wandb: {install('wandb')}"
            ) from None
        return Reporter(wandb, self)


@hookimpl
def jemkit_trackers() -> Mapping[str, type[TrackerSpec]]:
    return {"wandb": WandB}
