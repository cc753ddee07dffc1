"""Conformance checks of trackers, on a simulated run."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from jemkit.metrics.figures import Figure
from jemkit.metrics.tracker import CALLBACKS, TrackedRun, Tracker, TrackerSpec
from jemkit.options import nearest
from jemkit.runtime.files import write_text
from jemkit.runtime.opening import read_file
from jemkit.testing.law import gave, require

LOGS = {
    "config.json": "{}\n",
    "metrics.csv": "step,epoch,lr\n0,1,0.1\n",
    "events.jsonl": '{"time": 0, "event": "start", "step": 0}\n',
}
"""Files of a run, which are the run's own."""


def check_tracker(spec: TrackerSpec) -> None:
    """Checks a tracker on a run that is stopped and resumed; one of a service really uses it."""
    with TemporaryDirectory() as place:
        folder, stored = Path(place).resolve() / "run", dict[str, Any]()
        folder.mkdir()
        for name, text in LOGS.items():
            write_text(folder / name, text)
        stopped = _SimulatedRun(spec, folder, 0, stored)
        stopped.call("on_begin", stopped.run)
        stopped.train()
        stopped.call("on_rollback", 1)
        stopped.train()
        stopped.call("on_end", "preempted")
        resumed = _SimulatedRun(spec, folder, 2, stored)
        resumed.call("on_begin", resumed.run)
        resumed.train()
        resumed.call("on_evaluation", 3, [Figure("clean", 0.5, 0.4, 0.6, 8, {"split": "test"})])
        resumed.call("on_end", "finished")
        empty = _SimulatedRun(spec, folder, 0, stored)
        empty.call("on_begin", empty.run)
        empty.call("on_end", "failed")
        law = "leaves the run's config.json, metrics.csv and events.jsonl alone"
        same = all(read_file(folder / name) == text.encode() for name, text in LOGS.items())
        require(same, spec, "files", law)


class _SimulatedRun:
    """A run as a tracker sees it, from a step on."""

    def __init__(self, spec: TrackerSpec, folder: Path, step: int, stored: dict[str, Any]) -> None:
        self.spec, self.step = spec, step
        with _undisturbed(spec):
            self.tracker: Tracker = spec.build()
        missing = [name for name in CALLBACKS if not callable(getattr(self.tracker, name, None))]
        law = "`build` gives a Tracker"
        require(not missing, spec, "interface", law, gave(self.tracker))
        named = [name for name in dir(self.tracker) if name.startswith("on_")]
        unknown = [f"{name}{nearest(name, CALLBACKS)}" for name in {*named} - {*CALLBACKS}]
        law = "every method whose name begins with on_ is a callback"
        require(not unknown, spec, "interface", law, f"it has {', '.join(sorted(unknown))}")

        def store(values: dict[str, Any]) -> None:
            stored.clear()
            stored.update(json.loads(json.dumps(values)))

        recipe = {"run": {"epochs": 1, "max_train": None}, "data": {"use": "digits"}}
        self.run = TrackedRun(folder, recipe, step, 4, deepcopy(stored), store)

    def train(self) -> None:
        """Two steps and an epoch; the last loss is not finite."""
        for loss in (2.5, math.nan):
            row = {"epoch": 1, "lr": 0.1, "loss": loss, "loss p(y|x)": loss, "E(x+)": -1.0}
            self.call("on_step", self.step, row)
            self.step += 1
        self.call("on_epoch", self.step, {"accuracy": 0.5, "pgd10": 0.25, "seconds": 1.5})

    def call(self, name: str, *given: Any) -> None:
        """A callback, which must leave alone what is not its own."""
        before = repr(given)
        with _undisturbed(self.spec):
            getattr(self.tracker, name)(*given)
        require(repr(given) == before, self.spec, "inputs", f"`{name}` leaves its arguments alone")


@contextmanager
def _undisturbed(spec: TrackerSpec) -> Iterator[None]:
    """Checks that the block leaves the process as it was: randomness, switches, folder."""
    state, switches = torch.get_rng_state(), _switches()
    yield
    law = "leaves torch's global generator alone"
    require(torch.equal(state, torch.get_rng_state()), spec, "generator", law)
    law = "leaves torch's switches, its number of threads and the working directory alone"
    require(switches == _switches(), spec, "switches", law)


def _switches() -> tuple[object, ...]:
    own = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    return (*own, torch.are_deterministic_algorithms_enabled(), os.getcwd())
