"""`python -m jemkit` is the `jemkit` command, found by its name."""

import os
import signal
import sys
from types import FrameType


def interrupted(_: int, __: FrameType | None) -> None:
    """Nothing has begun that a ^C could harm; the command listens by itself later."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)

from importlib.metadata import entry_points  # noqa: E402

if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first one speaks
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

(command,) = set(entry_points(group="console_scripts", name="jemkit"))
command.load()()
