"""`python -m jemkit` is the `jemkit` command, found by its name."""

import os
import sys
from importlib.metadata import entry_points

if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first one speaks
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

(command,) = set(entry_points(group="console_scripts", name="jemkit"))
command.load()()
