"""`python -m jemkit` is the `jemkit` command, found by its name."""

from importlib.metadata import entry_points

(command,) = set(entry_points(group="console_scripts", name="jemkit"))
command.load()()
