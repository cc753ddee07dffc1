"""torchvision comes in by one door, beside any build of torch."""

import ast
import importlib
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from ranks import in_a_new_process

from jemkit.errors import ConfigError
from jemkit.runtime import torchvision_compat

ROOT = Path(__file__).parents[2]


def messages_of(caller: Callable[[], object]) -> list[str]:
    """What a call logs at level INFO."""
    messages: list[str] = []
    log = logging.getLogger("jemkit")
    log.setLevel("INFO")
    log.addFilter(lambda record: messages.append(record.getMessage()) or False)
    caller()
    return messages


def loads_lazily() -> None:
    assert not any(name.startswith("torchvision") for name in sys.modules)
    messages = messages_of(torchvision_compat.torchvision)
    package = torchvision_compat.torchvision()
    assert package is sys.modules["torchvision"]
    assert package.datasets.CIFAR10
    assert package.models.alexnet
    assert len(messages) == (0 if package.extension._has_ops() else 1), messages


def loads_after_a_failure() -> None:
    with suppress(RuntimeError):
        importlib.import_module("torchvision")
    assert torchvision_compat.torchvision().datasets.CIFAR10


def loads_beside_an_operator() -> None:
    theirs = torch.library.Library("torchvision", "DEF")
    theirs.define(torchvision_compat.OPERATORS["nms"])
    theirs.impl("nms", lambda dets, scores, iou: scores.argsort(), "CPU")
    messages = messages_of(torchvision_compat.torchvision)
    boxes, scores = torch.zeros(2, 4), torch.tensor([2.0, 1.0])
    assert torch.ops.torchvision.nms(boxes, scores, 0.5).tolist() == [1, 0]
    assert len(messages) == 1
    assert "so qnms are declared" in messages[0]


def test_torchvision_loads_lazily_and_says_once_what_it_lacks() -> None:
    in_a_new_process(loads_lazily)  # operators, once declared, stay for the life of a process


def test_an_import_that_failed_before_does_no_harm() -> None:
    in_a_new_process(loads_after_a_failure)


def test_operators_that_are_there_are_left_alone() -> None:
    if torchvision_compat.torchvision().extension._has_ops():
        pytest.skip("the real operators are loaded here")
    in_a_new_process(loads_beside_an_operator)


def test_an_absent_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigError, match="pip install torchvision"):
        torchvision_compat.torchvision()


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
