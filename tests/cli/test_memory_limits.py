"""Memory that runs out in a command ends it with 7 and one line."""

import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import SHORT, jemkit
from forked import forked

from jemkit.errors import memory_ran_out


def arrays() -> Any:
    return np.zeros((1 << 50,), dtype=np.uint8)


def tensors() -> Any:
    return torch.zeros(1 << 52)


def words() -> Any:
    return b"x" * (1 << 60)


@pytest.mark.parametrize("take", [arrays, tensors, words], ids=lambda take: take.__name__)
def test_an_allocation_that_fails_is_a_lack_of_memory(take: Callable[[], Any]) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        take()
    assert memory_ran_out(caught.value)


@pytest.mark.parametrize(
    ("take", "module", "name", "arguments"),
    [
        (tensors, "training.run", "Trainer", ("train", *SHORT)),
        (words, "config.recipe", "resolve", ("config", "show")),
        (arrays, "evaluation.report", "write", ("report", ".")),
        (words, "training.pretrained", "import_checkpoint", ("import", "x.pt", "--format=jem")),
        (arrays, "evaluation.subjects", "subject_at", ("evaluate", ".")),
        (tensors, "evaluation.sample", "sample_request", ("sample", ".")),
    ],
)
def test_memory_that_runs_out_anywhere_in_a_command_ends_with_7_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    take: Callable[[], Any], module: str, name: str, arguments: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"jemkit.{module}.{name}", lambda *_, **__: take())
    done = jemkit(*arguments)
    assert done.code == 7, done.err
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("error: out of memory (")


def test_an_error_of_c_code_without_an_exception_is_memory_that_ran_out() -> None:
    assert memory_ran_out(SystemError("error return without exception set"))
    assert not memory_ran_out(SystemError("Parent module '' not loaded"))


@pytest.mark.parametrize("more", [8 << 20, 250 << 20])
def test_a_limit_of_memory_ends_a_command_with_7(tmp_path: Path, more: int) -> None:
    """The limit is what the process has when torch is imported, and a little."""
    big = ("--network=wrn-40-10", "--device=cpu", "--set=run.max_train=80", "--epochs=1")
    done = forked(
        "train", "--backbone=jem", "--objective=jem", *big,
        cwd=tmp_path, before=partial(limit_memory, more),
    )  # fmt: skip
    assert done.code == 7, done.err
    assert "Traceback" not in done.err


def limit_memory(more: int) -> None:
    """What the process has, and so many bytes more; of disk whatever a run of that size takes."""
    shutil.disk_usage = lambda _: SimpleNamespace(free=1 << 50)  # type: ignore[assignment]
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + more, has + more))
