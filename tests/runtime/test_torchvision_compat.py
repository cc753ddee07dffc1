"""torchvision comes in by one door, beside any build of torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jemkit.errors import ConfigError
from jemkit.runtime import torchvision_compat

ROOT = Path(__file__).parents[2]


def run(script: str) -> None:
    """A fresh interpreter: operators, once declared, stay for the life of a process."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_torchvision_loads_lazily_and_says_once_what_it_lacks() -> None:
    run("""
import logging, sys
from jemkit.runtime import torchvision_compat as vision
assert not any(name.startswith("torchvision") for name in sys.modules)
told = []
log = logging.getLogger("jemkit")
log.setLevel("INFO")
log.addFilter(lambda record: told.append(record.levelname) or False)
package = vision.torchvision()
assert package is vision.torchvision() is sys.modules["torchvision"]
assert package.datasets.CIFAR10 and package.models.alexnet
assert told == ([] if package.extension._has_ops() else ["INFO"]), told
""")


def test_an_import_that_failed_before_does_no_harm() -> None:
    run("""
try:
    import torchvision
except RuntimeError:
    pass
from jemkit.runtime import torchvision_compat as vision
assert vision.torchvision().datasets.CIFAR10
""")


def test_operators_that_are_there_are_left_alone() -> None:
    if torchvision_compat.torchvision().extension._has_ops():
        pytest.skip("the real operators are loaded here")
    run("""
import logging, torch
from jemkit.runtime import torchvision_compat as vision
theirs = torch.library.Library("torchvision", "DEF")
theirs.define(vision.OPERATORS["nms"])
theirs.impl("nms", lambda dets, scores, iou: scores.argsort(), "CPU")
told = []
log = logging.getLogger("jemkit")
log.setLevel("INFO")
log.addFilter(lambda record: told.append(record.getMessage()) or False)
boxes, scores = torch.zeros(2, 4), torch.tensor([2.0, 1.0])
vision.torchvision()
assert torch.ops.torchvision.nms(boxes, scores, 0.5).tolist() == [1, 0]
assert len(told) == 1 and "so qnms are declared" in told[0], told
""")


def test_an_absent_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigError, match="pip install torchvision"):
        torchvision_compat.torchvision.__wrapped__()


def test_nobody_else_imports_torchvision() -> None:
    guilty = [
        str(path.relative_to(ROOT))
        for package in ("jemkit", "plugins", "cli")
        for path in (ROOT / package).rglob("*.py")
        if "torchvision" in imports(path)
    ]
    assert guilty == []


def imports(path: Path) -> set[str]:
    """The top-level names of all that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names
