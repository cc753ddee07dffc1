"""Checkpoints written behind a run's back: in order, of the moment of the call, failures told."""

from pathlib import Path
from threading import Event

import pytest
import torch

from jemkit import checkpoint
from jemkit.checkpoint import same
from jemkit.runtime.trees import Snapshot


def state() -> dict[str, object]:
    return {"model": {"head.bias": torch.arange(3.0)}, "density": [torch.ones(4, 2)], "step": 1}


def test_a_writer_returns_before_the_files_are_there_and_keeps_the_order(tmp_path: Path) -> None:
    gate, order = Event(), []
    writer = checkpoint.Writer()
    one = state()
    kept = Snapshot().of(one)
    writer.save(tmp_path / "step-0", one, then=lambda: (gate.wait(), order.append(0)))
    one["model"]["head.bias"].add_(1)  # the run goes on
    gate.set()
    writer.save(tmp_path / "step-1", one, then=lambda: order.append(1))
    writer.wait()
    assert order == [0, 1]
    assert same(checkpoint.load(tmp_path / "step-0"), kept)
    assert same(checkpoint.load(tmp_path / "step-1"), one)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0", "step-1"]


def test_what_fails_behind_a_run_is_raised_once_by_the_next_call(tmp_path: Path) -> None:
    for again in ("wait", "save"):
        writer = checkpoint.Writer()
        writer.save(tmp_path / "odd", {"model": {}, "odd": tmp_path})
        with pytest.raises(TypeError, match="cannot hold PosixPath"):
            writer.wait() if again == "wait" else writer.save(tmp_path / "b", {"model": {}})
        writer.wait()
    assert list(tmp_path.iterdir()) == []
