"""A run that several files of tests read."""

from pathlib import Path

import pytest
from cli_tools import SHORT, Outcome
from forked import forked


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """One tiny run by the command in a process of its own."""
    home = tmp_path_factory.mktemp("home")
    return home, forked("train", *SHORT, "--json", cwd=home)
