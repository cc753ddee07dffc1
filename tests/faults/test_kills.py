"""A run that is killed at any point resumes to the end of the run that was not killed."""

import random
import signal
from pathlib import Path

import pytest
from lab import check

STATUSES = (0, signal.SIGKILL)


@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_killed_before_any_operation_on_a_file_it_resumes_to_the_same_end(
    tmp_path: Path, what: str
) -> None:
    """Killed at its beginning, twice within it and near its end."""
    draw = random.Random(0)
    shares = [0.05, *(draw.random() for _ in range(2)), 0.97]
    check(tmp_path, what, "kill", shares, STATUSES)


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("kind", ["kill", "time"])
@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_a_hundred_kills_at_random_change_nothing(tmp_path: Path, what: str, kind: str) -> None:
    draw = random.Random(kind)
    check(tmp_path, what, kind, [draw.random() for _ in range(100)], STATUSES)
