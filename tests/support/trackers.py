"""Stand-ins for the packages of trackers, and a tracker that a test watches."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from jemkit import (
    Figure,
    Figures,
    Options,
    Status,
    TrackedRun,
    Tracker,
    TrackerSpec,
    hookimpl,
)
from jemkit.config.registry import Plugin

CALLS: list[tuple[Any, ...]] = []
"""What trackers of the kind `hear` were told, in order."""


class Hearing(Tracker):
    """Notes every callback; raises in one of them."""

    def __init__(self, raises: str) -> None:
        self.raises = raises

    def note(self, name: str, *given: Any) -> None:
        CALLS.append((name, *given))
        if name == self.raises:
            raise ConnectionError("the server is away")
        if name == self.raises.removesuffix("!"):
            sys.exit(3)

    def on_begin(self, run: TrackedRun) -> None:
        run.store({"begun": run.stored.get("begun", 0) + 1})
        self.note("begin", run)

    def on_step(self, step: int, figures: Figures) -> None:
        self.note("step", step, figures)

    def on_epoch(self, step: int, figures: Figures) -> None:
        self.note("epoch", step, figures)

    def on_evaluation(self, step: int, figures: Any) -> None:
        self.note("evaluation", step, [Figure(*f) for f in figures])

    def on_rollback(self, step: int) -> None:
        self.note("rollback", step)

    def on_end(self, status: Status) -> None:
        self.note("end", status)


class Hear(Options):
    """Options of a tracker that a test watches."""

    raises: str = ""  # the callback that raises

    def build(self) -> Tracker:
        return Hearing(self.raises)


class Meddling(Tracker):
    """Changes whatever a callback can reach."""

    def on_begin(self, run: TrackedRun) -> None:
        run.recipe["run"]["epochs"] = 7

    def on_step(self, step: int, figures: Figures) -> None:
        import random

        import numpy as np
        import torch

        torch.manual_seed(step)
        np.random.seed(step)
        random.seed(step)
        assert isinstance(figures, dict)
        figures.clear()

    def on_epoch(self, step: int, figures: Figures) -> None:
        assert isinstance(figures, dict)
        figures["pgd10"] = 2.0

    def on_evaluation(self, step: int, figures: Any) -> None:
        figures.clear()


class Meddle(Options):
    """Options of a tracker that changes what it is given."""

    def build(self) -> Tracker:
        return Meddling()


class TrackerPlugin:
    """Offers both, as a guest of `toy_registry`."""

    @staticmethod
    @hookimpl
    def jemkit_trackers() -> Mapping[str, type[TrackerSpec]]:
        return {"hear": Hear, "meddle": Meddle}


GUEST = Plugin("trackers", TrackerPlugin)


class Writer:
    """A SummaryWriter that writes lines of JSON; TensorBoard's purge is an entry of its own."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.file = (folder / "scalars.jsonl").open("a")
        self.file.write(json.dumps({"purge": purge_step}) + "\n")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.file.write(json.dumps([name, float(value), step]) + "\n")

    def close(self) -> None:
        self.file.close()


class WandB(ModuleType):
    """wandb, as far as the tracker uses it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.began: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.codes: list[int] = []
        self.axes: list[Any] = []
        self.Settings = SimpleNamespace

    def init(self, **given: Any) -> Any:
        self.began.append(given)
        return SimpleNamespace(
            id=given["id"] or f"new{len(self.began)}",
            define_metric=lambda name, **options: self.axes.append((name, options)),
            log=self.rows.append,
            finish=lambda exit_code: self.codes.append(exit_code),
        )


class Store:
    """MLflow's client and its store."""

    def __init__(self) -> None:
        self.runs: dict[str, str] = {}
        self.params: list[Any] = []
        self.metrics: list[Any] = []

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return "1"

    def create_run(self, experiment: str, run_name: str) -> Any:
        key = f"{len(self.runs):032x}"
        self.runs[key] = "RUNNING"
        return SimpleNamespace(info=SimpleNamespace(run_id=key))

    def get_run(self, key: str) -> str:
        if key not in self.runs:
            raise LookupError(key)
        return self.runs[key]

    def update_run(self, key: str, status: str) -> None:
        self.runs[key] = status

    def log_batch(self, key: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.metrics += metrics
        self.params += params

    def set_terminated(self, key: str, status: str) -> None:
        self.runs[key] = status


class MLflow(ModuleType):
    """mlflow, as far as the tracker uses it."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.store = Store()
        self.entities = SimpleNamespace(
            Metric=lambda *given: given, Param=lambda key, value: (key, value)
        )
        self.exceptions = SimpleNamespace(MlflowException=LookupError)

    def MlflowClient(self) -> Store:
        return self.store


def stand_in(patch: pytest.MonkeyPatch) -> tuple[WandB, MLflow]:
    """Put stand-ins in the place of the three packages."""
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    wandb, mlflow = WandB(), MLflow()
    for module in (board, wandb, mlflow):
        patch.setitem(sys.modules, module.__name__, module)
    return wandb, mlflow
