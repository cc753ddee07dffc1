"""What a kill or a damaged disk leaves of a run's checkpoints is found, named and put back."""

import os
from pathlib import Path

import pytest
from states import state

from jemkit import DataError
from jemkit.runtime import checkpoint
from jemkit.runtime.checkpoint import FILES, MANIFEST, MODEL
from jemkit.runtime.files import set_aside
from jemkit.runtime.pytree import same


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best", state())
    os.replace(tmp_path / "best", tmp_path / ".best.abc.old")
    checkpoint.save(tmp_path / ".best.abc", state(1))  # whole, but not in its place yet
    checkpoint.recover(tmp_path)
    assert same(checkpoint.load(tmp_path / "best"), state())
    checkpoint.prune(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_the_best_has_the_files_of_the_newest_and_outlives_it(tmp_path: Path) -> None:
    best, step = tmp_path / "best", tmp_path / "step-1"
    checkpoint.save(best, state())
    checkpoint.save(step, state(1), best=best)
    assert same(checkpoint.load(best), state(1))
    for name in (*FILES, MANIFEST):
        assert (best / name).samefile(step / name)
    checkpoint.save(tmp_path / "step-2", state(2))
    checkpoint.prune(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-2"]
    assert same(checkpoint.load(best), state(1))


def test_the_newest_sound_checkpoint_is_loaded_and_damaged_ones_are_named(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / f"step-{step}", state(step))
    (tmp_path / "step-3" / MODEL).write_bytes(b"no weights")
    (tmp_path / "step-2" / MANIFEST).write_text("{}")
    sound = checkpoint.sound(tmp_path)
    assert sound.path.name == "step-1"
    assert same(sound.state, state(1))
    assert [p.name for p in sound.damaged] == ["step-3", "step-2"]
    assert set_aside(tmp_path / "step-3").name == "damaged-step-3"
    checkpoint.save(tmp_path / "step-3", state(3))
    assert set_aside(tmp_path / "step-3").name == "damaged-step-3-1"
    (tmp_path / "step-1" / MODEL).unlink()
    with pytest.raises(DataError, match=r"no checkpoint in .* can be read"):
        checkpoint.sound(tmp_path)


def test_a_removed_checkpoint_is_gone_and_what_half_a_removal_left_is_cleared(
    tmp_path: Path,
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / f"step-{step}", {"model": {}})
    (tmp_path / ".step-1.gone").mkdir()
    (tmp_path / ".step-1.gone" / "left").touch()
    checkpoint.remove(tmp_path / "step-1")
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]
    (tmp_path / ".step-1.gone").mkdir()
    checkpoint.prune(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]
