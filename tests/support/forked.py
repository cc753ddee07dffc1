"""The command in a fork of a process that has imported all it needs: a process of its own, without
the seconds that its imports take."""

import importlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from cli_tools import Outcome, environment
from ranks import FORKING, ready

from jemkit_cli.app import main

Before = Callable[[], None]
STREAMS = ("stdin", "stdout", "stderr")
MODES = (
    os.O_RDONLY,
    os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    os.O_WRONLY | os.O_CREAT | os.O_APPEND,
)


class Forked:
    """A command that runs; its streams are files unless paths of others are given.

    `before` is called in the process before the command, and must be importable.
    """

    def __init__(
        self, *arguments: str, cwd: Path, before: Before | None = None, encoding: str = "utf-8",
        streams: Mapping[str, str] | None = None, **env: str,
    ) -> None:  # fmt: skip
        ready()
        self.folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        defaults = {"stdin": os.devnull, **{n: str(self.folder / n) for n in STREAMS[1:]}}
        paths = {**defaults, **(streams or {})}
        self.process = FORKING.Process(
            target=_command,
            args=(arguments, str(cwd), environment(**env), paths, encoding, before),
            daemon=True,
        )
        self.process.start()

    def send_signal(self, number: signal.Signals) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid or 0, number)

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode or 0

    def text(self, stream: str) -> str:
        """What it has written so far."""
        path = self.folder / stream
        return path.read_text() if path.exists() else ""

    def outcome(self) -> Outcome:
        """How it ended, once it has."""
        code = self.wait()
        return Outcome(code, self.text("stdout"), self.text("stderr"))


def forked(*arguments: str, cwd: Path, before: Before | None = None, **env: str) -> Outcome:
    """The command to its end."""
    return Forked(*arguments, cwd=cwd, before=before, **env).outcome()


def processes(
    *arguments: str, cwd: Path, size: int = 2, before: Before | None = None, **env: str
) -> list[Forked]:
    """The command in every process of a group, each of which learns of it as from torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    return [
        Forked(*arguments, cwd=cwd, before=before, RANK=str(r), LOCAL_RANK=str(r), **group, **env)
        for r in range(size)
    ]


def commands(
    *arguments: str, cwd: Path, size: int = 2, before: Before | None = None, **env: str
) -> list[Outcome]:
    """The command in every process of a group, to its end."""
    running = processes(*arguments, cwd=cwd, size=size, before=before, **env)
    return [process.outcome() for process in running]


def _command(
    arguments: tuple[str, ...], cwd: str, env: dict[str, str], streams: dict[str, str],
    encoding: str, before: Before | None,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(env)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, (name, mode) in enumerate(zip(STREAMS, MODES, strict=True)):
        opened = os.open(streams[name], mode | os.O_NOCTTY)
        os.dup2(opened, target)
        os.close(opened)
    for target, name in enumerate(STREAMS):
        stream = open(  # noqa: SIM115
            target, "w" if target else "r", 1 if target == 2 else -1, encoding, closefd=False
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(cwd)
    sys.path[:0] = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    importlib.invalidate_caches()
    sys.argv = ["-c", *arguments]
    if before is not None:
        before()
    main()
