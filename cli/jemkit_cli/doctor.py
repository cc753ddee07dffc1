"""`jemkit doctor`: checks the installation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jemkit_cli.terminal import NoPlugins, guarded, say, say_json

if TYPE_CHECKING:
    from jemkit.testing.doctor import Check


@guarded
def doctor(
    no_plugins: NoPlugins = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One line of JSON: whether all checks passed, and each check."),
    ] = False,
) -> None:
    """Check torch, weights, plug-ins and disk, and test a small model; exit code 1 on a failure."""
    from jemkit.config.registry import installed
    from jemkit.testing.doctor import diagnose, healthy

    checks = diagnose(installed(third_party=not no_plugins), Path.cwd())
    well = healthy(checks)
    if as_json:
        say_json({"ok": well, "checks": [check._asdict() for check in checks]})
    else:
        show_checks(checks)
    if not well:
        raise typer.Exit(1)


def show_checks(checks: Sequence["Check"]) -> None:
    """A line for each check, its advice below it, and the names of those that failed."""
    for check in checks:
        say(f"{check.state:<5} {check.name:<20} {check.what}")
        if check.advice:
            say(f"{'':26} -> {check.advice}")
    failed = [check.name for check in checks if check.state == "fail"]
    say(f"failed: {', '.join(failed)}" if failed else "nothing fails")
