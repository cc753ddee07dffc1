"""Processes of a group on this machine, by gloo: a function that each runs, and its answers."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from toys import root
from waiting import SAFETY, until

from jemkit.runtime.distributed import group, shard
from jemkit.runtime.work_cache import Shard

Work = Callable[..., Any]
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload([
    "toys", "torch.distributed", "jemkit.training.run", "jemkit.evaluation.evaluate", "hypothesis",
    "jemkit_cli.commands", "jemkit.evaluation.sample", "sklearn.datasets", "torch._dynamo",
])  # fmt: skip


def ready() -> None:
    """A server that has imported what all processes need, and whose forks they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def every_rank(work: Work, *given: Any, size: int = 2) -> list[Any]:
    """work(*given) in `size` processes at once; tensors and plain values come back."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ready()
        running = [
            FORKING.Process(target=_one, args=(folder, Shard(rank, size), work, given), daemon=True)
            for rank in range(size)
        ]
        for process in running:
            process.start()
        until(lambda: ended(running), f"{size} processes", lambda: [p.exitcode for p in running])
        for process in running:
            process.kill()  # one has failed, and the others may wait for it
            process.join()
        assert [process.exitcode for process in running] == [0] * size
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def in_a_new_process(work: Work, *given: Any) -> None:
    """work(*given) in another process, which has imported all and done nothing yet."""
    ready()
    running = FORKING.Process(target=work, args=given, daemon=True)
    running.start()
    running.join()
    assert running.exitcode == 0


def ended(running: list[Any]) -> bool:
    """Whether all have ended, or one of them badly."""
    codes = [process.exitcode for process in running]
    return None not in codes or any(codes)


def _one(folder: Path, me: Shard, work: Work, given: tuple[Any, ...]) -> None:
    faulthandler.enable()  # a crash below Python says where it was
    torch.set_num_threads(1)
    with group(init=f"file://{folder}/meeting", shard=me):
        assert shard() == me
        dist.barrier()  # nobody is done and gone while another still looks for him
        torch.save(work(*given), folder / f"{me.rank}.pt")


def torchrun(
    *arguments: str,
    cwd: Path,
    size: int = 2,
    options: tuple[str, ...] = (),
    kill: Callable[[Path], bool] | None = None,
    by: signal.Signals = signal.SIGKILL,
    to_all: bool = False,
) -> subprocess.CompletedProcess[str]:
    """`torchrun -m jemkit ...` on this machine, at a port of its own.

    Once `kill(cwd)` is true the last process is killed, as a lost machine would be, or gets
    another signal; `to_all` sends it to torchrun, which passes it on.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={size}", *options, "-m", "jemkit", *arguments,
    ]  # fmt: skip
    paths = os.pathsep.join(str(root() / part) for part in (".", "plugins", "cli"))
    running = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    try:
        if kill is not None:
            until(lambda: running.poll() is not None or kill(cwd), "the moment of the signal")
            if running.poll() is None:
                os.kill(running.pid if to_all else _rank_of(running.pid, size - 1), by)
        out, errors = running.communicate(timeout=SAFETY)
    finally:
        running.kill()
    return subprocess.CompletedProcess(command, running.returncode, out, errors)


def _rank_of(parent: int, rank: int) -> int:
    """The process of that rank among a process's children."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    matching = [
        int(pid)
        for pid in children
        if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    return matching[0]
