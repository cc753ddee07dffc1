"""README and docs say what is so: code runs, links lead somewhere, names exist."""

import ast
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

from jemkit import run
from jemkit.config.recipe import resolve
from jemkit.config.registry import installed
from jemkit.sampling.reports import reports
from jemkit.testing import (
    check_ascent,
    check_evaluator,
    check_objective,
    check_sampler,
    check_tracker,
)

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@cache
def readme() -> str:
    """README; read when a test needs it, since the GPU kit has no documents."""
    return (ROOT / "README.md").read_text()


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", readme(), re.S)
    return str(code)


def test_readmes_example_is_under_twenty_lines_and_learns() -> None:
    code = example()
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    scope: dict[str, object] = {}
    shorter = code.replace("range(500)", "range(60)")
    assert shorter != code
    exec(compile(shorter, "README.md", "exec"), scope)
    right = eval("(net(x).argmax(1) == y).float().mean().item()", scope)
    assert right > 0.5  # chance is 0.1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_table_of_parts_names_every_part_and_links_its_file() -> None:
    registry = installed(third_party=False)
    for kind in ("backbone", "objective", "updater", "sampler", "ascent", "distance", "dataset",
                 "start", "attack", "evaluator", "tracker"):  # fmt: skip
        label = "data set" if kind == "dataset" else kind
        (row,) = re.findall(rf"^\| {label} \| (.*?) \|", readme(), re.M)
        bare = re.sub(r"\([^)]*\)", "", row)
        assert set(re.findall(r"`(\w+)`", bare)) == set(registry[kind]), kind
        links = dict(re.findall(r"\[`(\w+)`\]\(([^)]+)\)", row))
        for name, part in registry[kind].items():
            file = Path(inspect.getfile(part))
            assert ROOT / links.get(name, "") in (file, file.parent), f"{name}: link {file}"


def test_every_preset_in_readme_and_readings_resolves() -> None:
    registry = installed(third_party=False)
    (row,) = re.findall(r"^\| preset \| (.*?) \|", readme(), re.M)
    shown = {name for name in re.findall(r"`([\w-]+)`", row) if "NAME" not in name}
    named = {key.split("/")[1] for key in registry.recipes if key.startswith("preset/")}
    assert shown <= named
    pages = [(ROOT / "docs" / page).read_text() for page in ("readings.md", "rivals.md")]
    tables = "".join(page.partition("\n## Presets\n")[2] for page in pages)
    assert named == set(re.findall(r"^\| `([\w-]+)` \|", tables, re.M))
    for preset in named:
        assert resolve(registry, preset=preset).recipe.objective is not None


def test_the_table_of_rivals_names_plug_ins_and_presets_that_exist() -> None:
    registry = installed(third_party=False)
    page = (ROOT / "docs" / "rivals.md").read_text()
    table = page.partition("| system |")[2].partition("\n\n")[0]
    rows = [re.split(r"(?<!\\)\|", row)[1:-1] for row in table.splitlines()[2:]]
    assert len(rows) > 15
    for row in rows:
        assert len(row) == 7, row[0]
        parts, presets = (set(re.findall(r"`([\w-]+)`", cell)) for cell in row[2:4])
        assert parts <= {*registry["objective"], *registry["updater"]}, row[0]
        assert {f"preset/{name}" for name in presets} <= set(registry.recipes), row[0]
    assert "vart" not in registry["objective"]


def test_every_option_that_readings_names_exists() -> None:
    registry = installed(third_party=False)
    text = (ROOT / "docs" / "readings.md").read_text()
    tables = resolve(registry, named={"backbone": {"network": {"use": "wrn-28-10"}}}).tables
    for key in re.findall(r"`((?:backbone|run|schedule)\.[\w.]+)", text):
        at: object = tables
        for name in key.split("."):
            assert isinstance(at, dict), key
            assert name in at, key
            at = at[name]


def test_the_guides_objective_sampler_and_ascent_keep_the_laws() -> None:
    guide = (ROOT / "docs" / "write-a-plugin.md").read_text()
    (code,) = re.findall(r"```python no-example\n(.*?)```", guide, re.S)
    scope: dict[str, Any] = {}
    exec(IMPORTS + code, scope)
    check_objective(scope["Smoothed"]())
    check_sampler(scope["NoisySign"]())
    check_ascent(scope["NoisySignAscent"]())


def test_the_guides_sampler_with_a_state_keeps_the_laws_and_reports() -> None:
    guide = (ROOT / "docs" / "write-a-plugin.md").read_text()
    (code,) = re.findall(r"```python no-state\n(.*?)```", guide, re.S)
    scope: dict[str, Any] = {}
    exec(IMPORTS + code, scope)
    check_sampler(scope["HeavyBall"]())
    with reports() as recorded:
        run(scope["HeavyBall"](), lambda x: 3 * x.sum(1), torch.zeros(2, 4), Generator(), 2)
    assert [float(value) for value in recorded["sampler/gradient"]] == [6, 6]


def test_the_guides_evaluator_keeps_the_laws() -> None:
    guide = (ROOT / "docs" / "write-a-plugin.md").read_text()
    (code,) = re.findall(r"```python no-evaluator\n(.*?)```", guide, re.S)
    scope: dict[str, Any] = {}
    exec(IMPORTS + code, scope)
    check_evaluator(scope["Confidence"]())


def test_the_guides_tracker_keeps_the_laws() -> None:
    guide = (ROOT / "docs" / "write-a-plugin.md").read_text()
    (code,) = re.findall(r"```python no-tracker\n(.*?)```", guide, re.S)
    scope: dict[str, Any] = {}
    exec(IMPORTS + code, scope)
    check_tracker(scope["LeastTracker"]())


def test_the_page_on_evaluation_names_every_attack_and_evaluator() -> None:
    registry = installed(third_party=False)
    page = (ROOT / "docs" / "evaluate.md").read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    assert named == {*registry["attack"], *registry["evaluator"]}


IMPORTS = """
import math
from typing import ClassVar, NamedTuple
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor
from jemkit import (
    Backbone, Ball, Batch, Bounds, Context, EnergyFn, Figure, Figures, Images, Options, PixelModel,
    Sampler, ScalarTracker, Status, Terms, TrackedRun, Tracker, batches, gradient, noise_like,
    watched,
)
"""


def spoken(root: Path) -> str:
    """Every text of the packages, joined as Python joins it, with … for what is filled in."""
    collected: list[str] = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                collected.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                collected.append("".join(map(str, parts)))
    return "\n".join(collected)


def test_every_message_that_troubleshooting_lists_exists() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    listed = re.findall(r"^\| `(.+?)` \|", page, re.M)
    assert len(listed) > 20
    folders = ("jemkit", "plugins/jemkit_plugins", "cli/jemkit_cli")
    said = "\n".join(spoken(ROOT / folder) for folder in folders)
    assert [message for message in listed if message not in said] == []
