"""Checkpoints written behind a run's back: in order, of the moment of the call, failures told."""

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jemkit.runtime import checkpoint
from jemkit.runtime.pytree import Snapshot, same


def state() -> dict[str, object]:
    return {"model": {"head.bias": torch.arange(3.0)}, "density": [torch.ones(4, 2)], "step": 1}


def test_a_writer_returns_before_the_files_are_there_and_keeps_the_order(tmp_path: Path) -> None:
    gate, order = Event(), []
    writer = checkpoint.Writer()
    one = state()
    copy = Snapshot().of(one)
    writer.save(tmp_path / "step-0", one, then=lambda: (gate.wait(), order.append(0)))
    one["model"]["head.bias"].add_(1)  # the run goes on
    gate.set()
    writer.save(tmp_path / "step-1", one, then=lambda: order.append(1))
    writer.wait()
    assert order == [0, 1]
    assert same(checkpoint.load(tmp_path / "step-0"), copy)
    assert same(checkpoint.load(tmp_path / "step-1"), one)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0", "step-1"]


def test_what_fails_behind_a_run_is_raised_once_by_the_next_call(tmp_path: Path) -> None:
    for again in ("wait", "save"):
        writer = checkpoint.Writer()
        writer.save(tmp_path / "odd", {"model": {}, "odd": tmp_path})
        with pytest.raises(TypeError, match="cannot contain PosixPath"):
            writer.wait() if again == "wait" else writer.save(tmp_path / "b", {"model": {}})
        writer.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_ready_takes_no_memory_for_what_it_copies(tmp_path: Path) -> None:
    class Counts(TorchDispatchMode):
        """Counts the tensors that are given memory."""

        made = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.made += "empty" in str(func)
            return func(*args, **(kwargs or {}))

    for ready in (False, True):
        writer, one = checkpoint.Writer(), {"model": {"w": torch.ones(1000)}, "step": 1}
        if ready:
            writer.ready({**one, "optimizer": {}})
        with Counts() as counts:
            writer.save(tmp_path / f"step-{ready}", one)
        writer.wait()
        assert (counts.made == 0) == ready
