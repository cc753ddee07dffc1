"""The command as a test runs it: in this process where that is quick, else in one of its own."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from waiting import SAFETY

from jemkit_cli.app import main

TINY = (
    "--network=smallcnn",
    "--device=cpu",
    "--set=run.max_train=80",
    "--set=run.batch_size=16",
    "--set=run.eval_images=8",
    "--set=backbone.network.channels=2",
    "--set=backbone.buffer.capacity=20",
    "--set=backbone.steps=1",
)
SHORT = (*TINY, "--epochs=1", "--set=objective.adv_steps=1")
CLASSIFIER = (
    "--backbone=classifier",
    "--objective=ce",
    "--network=smallcnn",
    "--set=run.max_train=80",
    "--set=run.batch_size=16",
    "--epochs=1",
)
KEYS = [
    "run", "backbone", "objective", "dataset", "seed", "epochs", "seconds", "clean_accuracy",
    "pgd_accuracy", "radius_px", "energy_gap_mean", "energy_gap_variance", "energy_gap_relative",
]  # fmt: skip


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def record(self) -> Any:
        """The last line of standard output, as JSON."""
        return json.loads(self.out.splitlines()[-1], parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def jemkit(*arguments: str) -> Outcome:
    """The command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def short_run(folder: Path) -> Path:
    """A short run on digits, made in a folder, where the link runs/latest is written too."""
    with contextlib.chdir(folder):
        outcome = jemkit("train", *SHORT, "--quiet", "--out", "run")
    assert outcome.code == 0, outcome.err
    return folder / "run"


def one_line(done: Outcome, code: int) -> str:
    """The only line of an error."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    return done.err


def command(*arguments: str) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-c", "from jemkit_cli.app import main; main()", *arguments]


def environment(**more: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FORCE_COLOR")}
    return {**inherited, "OMP_NUM_THREADS": "1", **more}


def process(*arguments: str, cwd: Path, **env: str) -> Outcome:
    """The command in a process of its own."""
    done = subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=SAFETY,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
