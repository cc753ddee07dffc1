"""The notebooks run, and their saved outputs are whole, small and of no machine."""

import base64
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PATHS = re.compile(r"/(home|root|tmp|work|Users|private|var)/")


def cells(path: Path) -> list[dict[str, Any]]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def outputs(path: Path) -> list[dict[str, Any]]:
    return [output for cell in cells(path) for output in cell["outputs"]]


@pytest.fixture
def as_before() -> Iterator[None]:
    """A notebook may set what it likes of its process; other tests are not to see it."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    yield
    torch.set_rng_state(state)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("as_before")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_at_small_scale(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.setenv("SCALE", "0.01")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scope: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(path):
        exec(compile("".join(cell["source"]), f"{path.name}: {cell['id']}", "exec"), scope)
    importlib.import_module("matplotlib.pyplot").close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_was_executed_in_order_without_an_error(path: Path) -> None:
    assert [cell["execution_count"] for cell in cells(path)] == [*range(1, len(cells(path)) + 1)]
    assert {output["output_type"] for output in outputs(path)} <= {"stream", "display_data"}
    assert [output for output in outputs(path) if output.get("name") == "stderr"] == []
    drawn = [o["data"]["image/png"] for o in outputs(path) if "data" in o]
    assert len(drawn) >= 1
    assert all(base64.b64decode(png).startswith(b"\x89PNG") for png in drawn)


def test_the_notebooks_are_small_and_name_no_machine() -> None:
    assert len(NOTEBOOKS) == 4
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 2_000_000
    for path in NOTEBOOKS:
        said = [*("".join(o.get("text", "")) for o in outputs(path)), path.read_text()]
        assert [text for text in said if PATHS.search(text)] == [], path.name


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("nbclient", "ipykernel")),
    reason="needs the extra notebooks",
)
def test_the_notebooks_run_in_a_kernel(tmp_path: Path) -> None:
    for path in [*NOTEBOOKS, FOLDER / "execute.py"]:
        shutil.copy(path, tmp_path)
    subprocess.run([sys.executable, tmp_path / "execute.py"], check=True, cwd=tmp_path)
    for path in NOTEBOOKS:
        new = tmp_path / path.name
        assert [o["output_type"] for o in outputs(new)] == [o["output_type"] for o in outputs(path)]
