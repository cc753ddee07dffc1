"""Old names of modules find what they named, with a warning, until version 0.3."""

import re
import subprocess
import sys
from importlib import import_module

import pytest
from toys import root

from jemkit.runtime.moved import MOVED, RENAMED, homes_of


def homes(old: str) -> list[object]:
    return [import_module(home) for home in homes_of(old)]


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_module_gives_the_names_of_the_new_one(old: str) -> None:
    sys.modules.pop(f"jemkit.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"jemkit.{old} is jemkit"):
        module = import_module(f"jemkit.{old}")
    for home in homes(old):
        for name in vars(home):
            if not name.startswith("__"):
                assert getattr(module, name) is not None or getattr(home, name) is None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_what_was_renamed_is_importable_by_its_old_name() -> None:
    collected = {}
    for old in MOVED:
        for home in homes(old):
            collected |= {name: old for name in RENAMED if hasattr(home, RENAMED[name])}
    assert set(collected) == set(RENAMED)
    for name, old in collected.items():
        sys.modules.pop(f"jemkit.{old}", None)
        with pytest.warns(DeprecationWarning, match="old name"):
            module = import_module(f"jemkit.{old}")
        assert getattr(module, name).__name__ == RENAMED[name]


def test_the_table_of_changes_tells_the_same() -> None:
    rows = re.findall(
        r"\| `jemkit\.(\S+)` \| `(jemkit\S+)` \|", (root() / "CHANGELOG.md").read_text()
    )
    printed = dict(rows)
    packages = {"evaluation", "sampling", "training"}  # where old names are found as before
    assert set(printed) - packages == set(MOVED)
    assert all(new == homes_of(old)[0] for old, new in printed.items() if old in MOVED)


OLD = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning, message=r"jemkit\\.")
from jemkit.registry import installed
from jemkit.recipe import resolve
from jemkit.assembly import put_together
from jemkit.attack import PGD, Threat
from jemkit.density import Buffer, Contrastive
from jemkit.evaluation import evaluate, judge
from jemkit.sampling import SGLD, run
from jemkit.training import Trainer
from jemkit.bench.floor import floor_of
from jemkit.runtime.sentinel import Finding
from jemkit import energy, generation
import jemkit
assert callable(evaluate) and jemkit.evaluate is evaluate
assert energy.ModelEnergy is jemkit.ModelEnergy
assert put_together.__name__ == "build_run"
"""


def test_imports_as_plug_ins_of_0_1_wrote_them_go_on() -> None:
    done = subprocess.run([sys.executable, "-c", OLD], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
