"""What a run says of its own pace is the device's, not that of a host which is ahead of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import toy_recipe, toy_registry

from jemkit import Guard, Terms, Trainer
from jemkit.runtime.run_dir import RunFolder
from jemkit.runtime.timing import Stopwatch, settle
from jemkit.training.metrics_log import Journal

LAUNCH, WORK = 0.5, 4.0
"""Seconds that a step takes the host, and the device behind it."""


class Machine:
    """A clock, and a device that is done with each step long after its launch."""

    def __init__(self) -> None:
        self.now = self.done = 0.0

    def clock(self) -> float:
        return self.now

    def launch(self) -> None:
        self.done = max(self.done, self.now) + WORK
        self.now += LAUNCH

    def wait(self) -> None:
        self.now = max(self.now, self.done)


class OnDevice(Tensor):
    """A tensor whose values the host waits for."""

    wait: Callable[[], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            OnDevice.wait()
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def machine() -> Machine:
    fake = Machine()
    OnDevice.wait = fake.wait  # type: ignore[method-assign]
    return fake


def step(journal: Journal, machine: Machine, at: int) -> None:
    """A step of 8 images, as a run takes it."""
    journal.stopwatch.begin()
    machine.launch()
    loss = torch.tensor(1.0).as_subclass(OnDevice)
    journal.note({"step": at}, 8, Terms.weighted({"CE": (1.0, loss)}), Guard())


def test_the_rate_is_that_of_the_device_over_the_steps_between_two_readings(
    tmp_path: Path, machine: Machine
) -> None:
    journal = Journal(RunFolder.create(tmp_path / "run"), stopwatch=Stopwatch(machine.clock))
    for at in range(5):
        step(journal, machine, at)
    journal.gather()
    assert journal.seconds == 5 * WORK
    machine.now += 100  # an epoch's end, which is no step
    for at in range(5, 8):
        step(journal, machine, at)
    newest = journal.gather()[-1]
    assert newest["images/s"] == 8 / WORK
    assert journal.seconds == 8 * WORK
    rows = RunFolder(tmp_path / "run").metrics()
    assert [float(row["images/s"]) for row in rows] == 8 * [8 / WORK]


def test_no_step_waits_for_the_device(tmp_path: Path, machine: Machine) -> None:
    journal = Journal(RunFolder.create(tmp_path / "run"), stopwatch=Stopwatch(machine.clock))
    for at in range(5):
        step(journal, machine, at)
    assert machine.now == 5 * LAUNCH


def test_a_step_that_failed_and_time_between_readings_are_no_part_of_any() -> None:
    machine = Machine()
    watch = Stopwatch(machine.clock)
    for spent, failed in ((2, False), (30, True), (3, False)):
        watch.begin()
        machine.now += spent
        if failed:
            watch.drop()
    assert watch.read() == 5
    machine.now += 70
    assert watch.read() == 0
    watch.begin()
    machine.now += 4
    assert watch.read() == 4


def test_a_reading_without_a_step_begins_again(tmp_path: Path, machine: Machine) -> None:
    journal = Journal(RunFolder.create(tmp_path / "run"), stopwatch=Stopwatch(machine.clock))
    journal.stopwatch.begin()
    machine.now += 9
    journal.stopwatch.drop()
    assert journal.gather() == []
    machine.now += 50  # going back to a checkpoint
    step(journal, machine, 0)
    journal.gather()
    assert journal.seconds == WORK


def test_a_runs_seconds_are_those_of_its_rows(tmp_path: Path) -> None:
    recipe = toy_recipe(toy_registry(), "classifier", "ce", "plain")
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run"))
    trainer.run()
    rows = RunFolder(tmp_path / "run").metrics()
    by_rows = sum(9 / float(row["images/s"]) for row in rows)
    assert len(rows) == trainer.step
    assert trainer.seconds == pytest.approx(by_rows, rel=0.05)
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    epochs = [e["seconds"] for e in map(json.loads, events) if e["event"] == "epoch"]
    assert epochs[-1] == pytest.approx(trainer.seconds, abs=1e-3)


def test_what_the_sampler_reports_is_a_column_of_the_log(tmp_path: Path) -> None:
    recipe = toy_recipe(toy_registry(), "jem", "jem", "plain", "backbone.sampler.use=mala")
    Trainer(recipe, RunFolder.create(tmp_path / "run")).run()
    rows = RunFolder(tmp_path / "run").metrics()
    rates = [float(row["sampler/acceptance"]) for row in rows]
    assert all(0 <= rate <= 1 for rate in rates)
    assert len(set(rates)) > 1


def test_settling_waits_for_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    settle(torch.device("cpu"))
    assert waited == []
    settle(torch.device("cuda", 0))
    assert waited == [torch.device("cuda", 0)]
