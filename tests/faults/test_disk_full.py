"""A full disk pauses a run or ends it by exit 6; what was saved before is whole either way."""

import resource
from functools import partial
from pathlib import Path

import pytest
from cli_tools import TINY
from forked import forked
from lab import check

from jemkit.runtime import checkpoint
from jemkit.runtime.disk import used_bytes

STATUSES = (0, 6 << 8)


@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_a_write_that_finds_no_room_once_changes_nothing(tmp_path: Path, what: str) -> None:
    check(tmp_path, what, "once", (0.0, 0.5), STATUSES)


@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_a_disk_that_stays_full_ends_it_and_room_lets_it_go_on(tmp_path: Path, what: str) -> None:
    check(tmp_path, what, "full", (0.02, 0.6), STATUSES)


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("kind", ["once", "full"])
@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_no_room_at_any_write(tmp_path: Path, what: str, kind: str) -> None:
    check(tmp_path, what, kind, [i / 150 for i in range(150)], STATUSES)


@pytest.mark.parametrize("largest", [1_000, 15_000])
def test_a_file_that_may_not_grow_ends_the_command_with_exit_6_and_its_name(
    tmp_path: Path, largest: int
) -> None:
    """The limit stands for a disk that fills in the midst of a file."""

    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest, largest))
    done = forked(
        "train", "--objective=jem", "--backbone=jem", *TINY, "--epochs=1", "--out=run",
        cwd=tmp_path, before=limit,
    )  # fmt: skip
    assert done.code == 6, done.err
    assert "File too large" in done.err
    assert "Traceback" not in done.err
    assert used_bytes(tmp_path / "run") >= 0
    if (tmp_path / "run" / "config.json").exists():
        checkpoint.sound(tmp_path / "run" / "checkpoints")
