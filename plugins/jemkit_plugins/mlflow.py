"""The tracker mlflow: an MLflow server, or a local store."""

import re
import time
from collections.abc import Mapping
from typing import Any

from jemkit import (
    ConfigError, Figures, Options, ScalarTracker, Status, TrackedRun, Tracker, TrackerSpec,
    hookimpl,
)  # fmt: skip
from jemkit.config.layers import flat
from jemkit.runtime.extras import install

ENDS: Mapping[Status, str] = {"finished": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}
BATCH = 500  # figures in one request; MLflow accepts 1000
SPELT = {"+": "pos", "~": "adv", "|": "_given_", "(": "_", ")": "", "[": "_", "]": "", ",": "_"}
"""Characters that MLflow does not accept in a name."""


def spelt(name: str) -> str:
    """A figure's name in MLflow's alphabet: E(x+) is E_xpos, loss p(y|x) loss_p_y_given_x."""
    text = "".join(SPELT.get(character, character) for character in name.replace(" ", "_"))
    return re.sub(r"[^\w.\-/]", "_", text, flags=re.ASCII)


class Sender(ScalarTracker):
    """Sends figures in batches; all that are left at the end of an epoch."""

    def __init__(self, mlflow: Any, options: "MLflow") -> None:
        self.mlflow, self.options = mlflow, options
        self.due: list[Any] = []

    def on_begin(self, run: TrackedRun) -> None:
        self.client = self.mlflow.MlflowClient()
        self.id = self.continued(run.stored.get("id")) or self.started(run)
        run.store({"id": self.id})

    def continued(self, known: Any) -> str | None:
        """The id of the run that is resumed, if the store still has it."""
        if not isinstance(known, str) or not re.fullmatch(r"[0-9a-f]{32}", known):
            return None
        try:
            self.client.get_run(known)
        except self.mlflow.exceptions.MlflowException:
            return None
        self.client.update_run(known, status="RUNNING")
        return known

    def started(self, run: TrackedRun) -> str:
        """The id of a new run, with the settings of the recipe as parameters."""
        name = self.options.experiment
        experiment = self.client.get_experiment_by_name(name)
        at = experiment.experiment_id if experiment else self.client.create_experiment(name)
        begun: str = self.client.create_run(at, run_name=run.folder.name).info.run_id
        settings = [
            self.mlflow.entities.Param(spelt(key), str(value)[:500])
            for key, value in flat(run.recipe)
        ]
        for first in range(0, len(settings), 100):  # as many as one request may have
            self.client.log_batch(begun, params=settings[first : first + 100])
        return begun

    def log(self, step: int, figures: Figures) -> None:
        now, metric = int(time.time() * 1000), self.mlflow.entities.Metric
        self.due += [metric(spelt(name), value, now, step) for name, value in figures.items()]
        if len(self.due) >= BATCH:
            self.send()

    def send(self) -> None:
        """Send the figures that are due."""
        for first in range(0, len(self.due), BATCH):
            self.client.log_batch(self.id, metrics=self.due[first : first + BATCH])
        self.due = []

    def on_epoch(self, step: int, figures: Figures) -> None:
        super().on_epoch(step, figures)
        self.send()

    def on_end(self, status: Status) -> None:
        self.send()
        self.client.set_terminated(self.id, status=ENDS[status])


class MLflow(Options):
    """A run of MLflow, in the store that MLFLOW_TRACKING_URI names."""

    experiment: str = "jemkit"  # the experiment's name; it is created if missing

    def build(self) -> Tracker:
        try:
            import mlflow
        except ImportError:
            raise ConfigError(
                f"the tracker mlflow needs the package mlflow: {install('mlflow')}"
            ) from None
        return Sender(mlflow, self)


@hookimpl
def jemkit_trackers() -> Mapping[str, type[TrackerSpec]]:
    return {"mlflow": MLflow}
