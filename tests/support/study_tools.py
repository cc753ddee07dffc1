"""Studies without training: toy rows, their runs, and commands that write what jemkit's would."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from forked import Forked
from report_runs import record

from jemkit.config.registry import installed
from jemkit.metrics import record as records
from jemkit.metrics.evaluator import Notes
from jemkit.metrics.record_file import Record
from jemkit.runtime.files import write_json
from jemkit_cli.study import running
from jemkit_cli.study.plan import Study, Unit, study_resolver, units
from jemkit_cli.study.running import run_all

OPTIONS = ("--attack", "pgd")


def study(*names: str, **more: Any) -> Study:
    """A study of PGD-AT at several radii."""
    rows = [
        {"name": name, "recipe": {"objective": {"use": "pgdat", "attack": {"steps": 1 + at}}}}
        for at, name in enumerate(names or ("a", "b"))
    ]
    common = {"backbone": {"use": "classifier"}, "data": {"use": "digits"}}
    given = {"title": "Study", "common": common, "rows": rows, "evaluate": OPTIONS, **more}
    return Study.model_validate(given)


def planned(given: Study, out: Path, **extra: Any) -> list[Unit]:
    return units(given, installed(), out, study_resolver(given, installed(), extra))


class Calls:
    """Commands that write what jemkit's would, without training."""

    def __init__(self, judged: Callable[[Path], Record] = lambda _: record()) -> None:
        self.commands: list[tuple[str, ...]] = []
        self.faults: dict[str, Exception] = {}
        self.judged = judged

    def __call__(self, arguments: list[str], stopped: threading.Event, folder: Path) -> str:
        self.commands.append((arguments[0], folder.name))
        for part, fault in self.faults.items():
            if part in folder.name:
                raise fault
        folder.mkdir(parents=True, exist_ok=True)
        if arguments[0] == "evaluate":
            records.save(folder, self.judged(folder), Notes())
            return "{}"
        if "--config" in arguments:
            recipe = json.loads(Path(arguments[arguments.index("--config") + 1]).read_text())
            write_json(folder / "config.json", {**recipe, "origins": {}})
        return 'text\n{"seconds": 12.5}'


def done(given: Study, out: Path, calls: Calls, jobs: int = 1) -> list[Unit]:
    plan = planned(given, out)
    run_all(
        plan, given, out, jobs=jobs, report=lambda _: None, progress=None,
        stop=lambda: False, call=calls,
    )  # fmt: skip
    return plan


class Fork:
    """In place of subprocess.Popen: the command in a fork of the tests' server."""

    starting: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, command: list[str], **_: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "jemkit"]
        with self.starting:
            self.running = Forked(*command[3:], cwd=Path.cwd())
        self.returncode: int | None = None

    def communicate(self, timeout: float) -> tuple[str, str]:
        self.running.process.join(timeout)
        self.returncode = self.running.poll()
        if self.returncode is None:
            raise subprocess.TimeoutExpired("jemkit", timeout)
        return self.running.text("stdout"), self.running.text("stderr")


def commands_by(popen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a study's commands by this class in place of subprocess.Popen."""
    processes = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
    monkeypatch.setattr(running, "subprocess", processes)
