"""The entry of the command `jemkit`: sets up signals and streams before the slow imports."""

import os
import signal
import sys


def _interrupted(*_: object) -> None:
    """Exit at once: nothing has started that ^C could harm."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if os.path.basename(sys.argv[0]) == "jemkit" and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):  # this is the command's own process, which is importing
    signal.signal(signal.SIGINT, _interrupted)


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Exit codes: 1 check failed, 2 usage, 3 recipe, 4 diverged, 5 stopped, 6 data, 7 memory, 130 ^C.
    """
    from jemkit_cli.process import listen, open_streams

    restore = listen()
    try:
        open_streams()
        from jemkit_cli.commands import run

        run(arguments)
    finally:
        if arguments is not None:  # called as a function, in a process that continues
            restore()


def __getattr__(name: str) -> object:
    if name == "app":
        from jemkit_cli.commands import app

        return app
    raise AttributeError(name)
