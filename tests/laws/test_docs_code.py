"""The code in README and docs: Python runs, and the command line takes every command."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_tools import SHORT, jemkit

from jemkit.config.recipe import resolve
from jemkit.config.registry import installed
from jemkit.options import Options
from jemkit_cli.study.plan import read_study

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
EXAMPLE = ROOT / "examples" / "plugin"
ELSEWHERE = {"README.md": "test_docs.py", "write-a-plugin.md": "test_docs.py and below"}
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
          '"aa"': '"pgd20"', "epochs=10": "epochs=1"}  # fmt: skip
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


def fenced(language: str, page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_the_guide_shows_the_code_of_its_example(monkeypatch: pytest.MonkeyPatch) -> None:
    *pieces, check = fenced("python", "write-a-plugin.md")
    example = (EXAMPLE / "jemkit_tempered.py").read_text()
    assert [piece for piece in pieces if piece not in example] == []
    monkeypatch.syspath_prepend(EXAMPLE)
    exec(compile(check, "write-a-plugin.md", "exec"), {})


def test_the_methods_that_the_guide_indents_are_methods_of_a_part() -> None:
    text = (ROOT / "docs" / "write-a-plugin.md").read_text()
    (unused,) = re.findall(r"^(    def unused.*?)^$", text, re.M | re.S)
    scope: dict[str, Any] = {"Options": Options}
    exec(f"class Part(Options):\n    penalty: float = 0.0\n{unused}", scope)
    assert scope["Part"]().unused() == {"penalty_on": "where penalty is 0"}
    assert scope["Part"](penalty=1.0).unused() == {}


def test_the_toml_of_the_pages_is_read_by_what_they_say_reads_it() -> None:
    registry = installed(third_party=False)
    recipe, trackers = (tomllib.loads(text) for text in fenced("toml", "train.md"))
    resolved = resolve(registry, config=recipe).recipe
    assert (resolved.run.epochs, resolved.run.seed) == (30, 1)
    wandb = resolve(registry, config=trackers).tables["trackers"]["wandb"]
    assert wandb == {**wandb, **trackers["trackers"]["wandb"]}
    (study,) = fenced("toml", "studies.md")
    assert len(read_study(tomllib.loads(study), "studies.md").rows) == 2
    example = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]
    for page in ("write-a-plugin.md", "api-stability.md"):
        (tables,) = fenced("toml", page)
        assert tomllib.loads(tables)["project"]["entry-points"] == example, page


def test_every_fenced_block_is_of_a_language_that_a_test_reads() -> None:
    marked = [(page.name, word) for page in PAGES
              for word in re.findall(r"^```(\w+)", page.read_text(), re.M)]  # fmt: skip
    toml = {name for name, language in marked if language == "toml"}
    assert toml == {"train.md", "studies.md", "write-a-plugin.md", "api-stability.md"}
    assert {language for _, language in marked} == {"python", "toml", "text"}
    assert [name for name, language in marked if language == "text"] == ["architecture.md"]
