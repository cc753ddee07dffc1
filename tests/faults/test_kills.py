"""A run that is killed wherever it stands goes on to the end of the run that was not."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def befallen(folder: Path, what: str, kind: str, faults: list[float]) -> list[dict[str, Any]]:
    """What the lab tells of runs, or evaluations, that these faults befell."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "lab.py")],
        input=json.dumps({"folder": str(folder), "what": what, "kind": kind, "faults": faults}),
        text=True, capture_output=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert told[0]["status"] == 0, done.stderr
    assert told[0]["operations"] > 30
    for line in told[1:]:
        if "differs" in line:
            assert line == {"status": 0, "differs": []}, (told, done.stderr)
    return told


def check_kills(told: list[dict[str, Any]]) -> None:
    for line in told[1:]:
        if "left" in line:
            assert line["status"] in (0, signal.SIGKILL), told
            assert line["left"] in ("sound", "unborn"), told


@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_killed_before_any_operation_on_a_file_it_goes_on_as_if_it_had_not_been(
    tmp_path: Path, what: str
) -> None:
    """Killed in its beginning, twice within it and near its end."""
    draw = random.Random(0)
    shares = [0.05, *(draw.random() for _ in range(2)), 0.97]
    check_kills(befallen(tmp_path, what, "kill", shares))


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("kind", ["kill", "time"])
@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_a_hundred_kills_at_random_change_nothing(tmp_path: Path, what: str, kind: str) -> None:
    draw = random.Random(kind)
    check_kills(befallen(tmp_path, what, kind, [draw.random() for _ in range(100)]))
