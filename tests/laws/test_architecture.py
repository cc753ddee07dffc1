"""The page on the architecture is true: its layers are the rule, its lists what a trace finds."""

import ast
import importlib
import math
import re
import sys
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from cli_tools import SHORT, jemkit
from toys import root

import jemkit_plugins.robustness as robustness
from jemkit.data import Batch, Loader
from jemkit.metrics import attack_runner
from jemkit.metrics.attack_runner import AttackRun
from jemkit.training import trainer

PACKAGES = ("jemkit", "plugins/jemkit_plugins", "cli/jemkit_cli")
PAGES = sorted([root() / "README.md", *(root() / "docs").glob("*.md")])


@cache
def architecture() -> str:
    """The page; read when a test needs it, since the GPU kit has no documents."""
    return (root() / "docs" / "architecture.md").read_text(encoding="utf-8")


def ours(code: CodeType) -> str | None:
    """The file of some code, if it is one of jemkit, its plug-ins or its command."""
    path = Path(code.co_filename)
    name = path.relative_to(root()).as_posix() if path.is_relative_to(root()) else ""
    return name if name.startswith(PACKAGES) else None


class Trace:
    """The files entered while it is on, in the order of their first entry."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self._names: dict[CodeType, str | None] = {}

    def add(self, code: CodeType) -> None:
        if code not in self._names:
            self._names[code] = name = ours(code)
            if name is not None and name not in self.files:
                self.files.append(name)

    def callers(self, frame: FrameType | None) -> None:
        """The files of the calls that led to a frame."""
        codes = []
        while frame is not None:
            codes.append(frame.f_code)
            frame = frame.f_back
        for code in reversed(codes):
            self.add(code)

    def start(self) -> None:
        def enter(frame: FrameType, event: str, _: Any) -> None:
            if event == "call":
                self.add(frame.f_code)

        sys.setprofile(enter)

    def stop(self) -> None:
        sys.setprofile(None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """A short run, and the files of each of its steps."""
    out, traces = tmp_path_factory.mktemp("architecture") / "run", []
    give, step = Loader.batch, trainer.Trainer.one_step

    def batch(loader: Loader) -> Batch:
        given = give(loader)
        trace = Trace()
        trace.callers(sys._getframe(1))
        trace.add(give.__code__)
        traces.append(trace)
        trace.start()
        return given

    def one_step(run: trainer.Trainer) -> None:
        try:
            step(run)
        finally:
            sys.setprofile(None)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)  # the link runs/latest is written there
        patch.setattr(Loader, "batch", batch)
        patch.setattr(trainer.Trainer, "one_step", one_step)
        patch.setattr(trainer, "PATIENCE", math.inf)  # a slow step would write its metrics at once
        parts = ("--backbone=sadajem", "--objective=ebjdat", "--dataset=digits")
        restarts = "--set=backbone.buffer.restart=0.5"  # some in every step
        outcome = jemkit("train", *parts, *SHORT, restarts, "--quiet", "--out", str(out))
    assert outcome.code == 0, outcome.err
    return out, [trace.files for trace in traces]


@pytest.fixture(scope="module")
def attacked(trained: tuple[Path, list[list[str]]]) -> list[str]:
    """The files from an attacked batch to its figure."""
    trace = Trace()
    attack, share = AttackRun._batch, attack_runner.robust_share

    def batch(run: AttackRun, *given: Any) -> Any:
        trace.callers(sys._getframe(1))
        trace.start()
        return attack(run, *given)

    def figure(*given: Any) -> Any:
        try:
            return share(*given)
        finally:
            trace.stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttackRun, "_batch", batch)
        patch.setattr(robustness, "robust_share", figure)
        options = ("--attack=pgd", "--only=robustness", "--max-images=8", "--device=cpu", "--json")
        outcome = jemkit("evaluate", str(trained[0]), *options)
    assert outcome.code == 0, outcome.err
    return trace.files


def section(title: str) -> tuple[list[str], list[str]]:
    """The numbered files of a section, and those of its table of support code."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", architecture(), re.M | re.S)
    numbers = re.findall(r"^(\d+)\. ", text, re.M)
    assert numbers == [str(n + 1) for n in range(len(numbers))]
    way = re.findall(r"^\d+\. `([^`]+)`: .", text, re.M)
    support = re.findall(r"^\| `([^`]+)` \| .", text, re.M)
    (counts,) = re.findall(r"(\d+) files carry the \w+, (\d+) support them, (\d+) in all", text)
    assert [int(n) for n in counts] == [len(way), len(support), len(way) + len(support)]
    assert len({*way, *support}) == len(way) + len(support)
    return way, support


def check_way(traced: list[str], title: str) -> None:
    way, support = section(title)
    assert {*traced} == {*way, *support}
    assert [name for name in traced if name in way] == way


def test_every_step_of_training_enters_the_files_of_the_page(
    trained: tuple[Path, list[list[str]]],
) -> None:
    _, steps = trained
    assert len(steps) > 1
    for traced in steps:
        check_way(traced, "The path of a batch")


def test_an_attacked_batch_enters_the_files_of_the_page(attacked: list[str]) -> None:
    check_way(attacked, "The path of an image")


def rule() -> list[list[str]]:
    """The layers as their test has them, the lowest first."""
    (path,) = (root() / "tests").rglob("test_layers.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS":
            return [names.split() for names in ast.literal_eval(node.value)]
    raise AssertionError("test_layers.py has no LAYERS")


def test_the_layers_of_the_page_are_those_of_the_rule() -> None:
    rows = re.findall(r"^\| (\d+) \| `([\w./]+)` \| [^|]+ \| ([\d-]+) \|$", architecture(), re.M)
    table: dict[int, list[str]] = {}
    for layer, where, below in rows:
        table.setdefault(int(layer), []).append(re.sub(r"\.py$|/$", "", where))
        assert (root() / "jemkit" / where).exists(), where
        assert where == "errors.py" or below.split("-")[-1] == layer, where
    assert [table[n + 1] for n in range(len(table))] == rule()
    picture = re.findall(r"^ \| +(\d+)  (.*)\|$", architecture(), re.M)
    drawn = {int(n): re.findall(r"^\w+(?=/)", names) or names.split() for n, names in picture}
    assert [drawn[n + 1] for n in range(len(drawn))] == rule()


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[n:]:
            if not hasattr(value, attribute):
                return False
            value = getattr(value, attribute)
        return True
    return False


def missing(text: str) -> list[str]:
    """The paths, and the dotted names of ours, in a text that lead nowhere."""
    folders = "jemkit|plugins|cli|tests|benchmarks|docs|examples"
    paths = set(re.findall(rf"(?<![\w./-])(?:\.\./)?((?:{folders})/[\w./-]*\w)", text))
    names = set(re.findall(r"(?<![\w./-])(jemkit(?:_plugins|_cli)?(?:\.[A-Za-z_]\w*)+)", text))
    lost = [path for path in sorted(paths) if not (root() / path).exists()]
    return lost + [name for name in sorted(names) if not is_there(name)]


def test_every_file_and_module_that_a_page_names_exists() -> None:
    lost = {page.name: missing(page.read_text(encoding="utf-8")) for page in PAGES}
    assert {page: names for page, names in lost.items() if names} == {}
    old = "`jemkit/update.py` was jemkit.layout, not ../tests/test_none.py or jemkit.DataError"
    assert missing(old) == ["jemkit/update.py", "tests/test_none.py", "jemkit.layout"]
