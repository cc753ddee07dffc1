"""The code in README and docs: Python runs, and the command line takes every command."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_tools import SHORT, jemkit

from jemkit.config.registry import installed

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
ELSEWHERE = {"README.md": "test_docs.py", "write-a-plugin.md": "test_docs.py"}
"""Pages whose Python code other tests run: in pieces, or with fewer steps."""


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """Every command of a page: the lines of indented blocks, and code within a sentence (True)."""
    joined = re.sub(r"\\\n\s*", "", text)
    for line in re.findall(r"^    (\S.*)$", joined, re.M):
        if re.match(r"(torchrun .*-m )?jemkit |python -m jemkit ", line):
            yield line, False
    outside = re.sub(r"^```.*?^```", "", joined, flags=re.M | re.S)
    yield from ((line, True) for line in re.findall(r"`(jemkit [a-z][^`]*)`", outside))


def arguments(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    given = words[words.index("jemkit") + 1 :]
    return [word for word in given if word not in ("...", "…")]


CASES = [(page, *case) for page in PAGES for case in dict.fromkeys(commands(page.read_text()))]
INCOMPLETE = ("MissingParameter", "BadOptionUsage")  # a sentence may name a command without its RUN


def test_there_are_commands_on_most_pages() -> None:
    assert len(CASES) > 100
    assert len({page for page, *_ in CASES}) > 15


def parsed(words: list[str]) -> None:
    """What typer does with a command, but for running it."""
    from jemkit_cli.commands import app

    command: Any = typer.main.get_command(app)
    parent, name = None, "jemkit"
    while hasattr(command, "resolve_command"):
        if not words:
            return  # `jemkit plugins`: it prints its help
        context = command.context_class(command, info_name=name, parent=parent)
        name, command, words = command.resolve_command(context, words)
        parent = context
    command.make_context(name, words, parent=parent)


def test_the_command_line_takes_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = []
    for page, line, inline in CASES:
        try:
            parsed(arguments(line))
        except Exception as error:
            if inline and type(error).__name__ in INCOMPLETE:
                continue
            wrong.append(f"{page.name}: {line}: {getattr(error, 'message', error)}")
    assert wrong == [], "\n".join(wrong)


def test_every_named_part_of_a_command_exists() -> None:
    registry = installed(third_party=False)
    wrong = []
    for page, line, _ in CASES:
        for kind in ("backbone", "objective", "updater", "sampler", "dataset", "attack", "network"):
            for name in re.findall(rf"--{kind} (\S+)", line):
                word = name.partition("-")[0]
                if name == name.lower() and word not in registry[kind]:
                    known = kind == "backbone" and word in (
                        "tempered",
                        "warm",
                    )  # plug-ins of the page
                    wrong += [] if known else [f"{page.name}: {line}"]
    assert wrong == [], "\n".join(wrong)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages' code reads: a run, its export."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert jemkit("train", *SHORT, "--out", "runs/NAME").code == 0
        (folder / "runs" / "latest").unlink(missing_ok=True)
        (folder / "runs" / "latest").symlink_to("NAME")
        assert jemkit("export", "runs/NAME").code == 0
    return folder


BEFORE = """
import torch
import jemkit
digits = jemkit.installed()["dataset"]["digits"]().load("test").take(slice(0, 20))
x, y = digits.x, digits.y
images = digits.unit()
classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""
FASTER = {'("aa",)': '("pgd",)', '("pgd",)': '("pgd",), only=("robustness",), max_images=20',
          '"aa"': '"pgd20"'}  # fmt: skip
"""Replaced in this order: what would take a minute."""


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S)


WITH_CODE = [page for page in PAGES if blocks(page) and page.name not in ELSEWHERE]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.name)
def test_the_code_of_a_page_runs(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    scope: dict[str, Any] = {}
    exec(BEFORE, scope)
    for code in blocks(page):
        for slow, fast in FASTER.items():
            code = code.replace(slow, fast)
        exec(compile(code, page.name, "exec"), scope)
