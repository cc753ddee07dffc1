"""A plug-in of somebody else's: built as a wheel, installed beside jemkit, used by the command."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from cli_tools import SHORT, Outcome, process
from forked import forked
from ranks import in_a_new_process

from jemkit.hookspecs import API

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plugin"
SAMPLER = """
from jemkit import Options, hookimpl

class {name}(Options):
    needs_stem: bool = False

    def step(self, energy, x, rng):
        return x

@hookimpl
def jemkit_samplers():
    return {{"stay": {name}}}
"""


def wheel(source: Path, into: Path) -> Path:
    """Build with the packages that are here, and nothing from a network."""
    arguments = ["--wheel", "--no-isolation", "--outdir", str(into), str(source)]
    done = subprocess.run(
        [sys.executable, "-m", "build", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return max(into.glob("*.whl"), key=lambda path: path.stat().st_mtime_ns)


def install(built: Path, site: Path) -> None:
    """What an installer does with a wheel of pure Python: unpack it."""
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)


def made(home: Path, name: str, module: str, code: str) -> None:
    """What an installer leaves under `home / "site"` of a wheel with one module."""
    about = home / "site" / f"{module}-0.7.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.7\n")
    (about / "entry_points.txt").write_text(f"[jemkit]\n{module} = {module}\n")
    (home / "site" / f"{module}.py").write_text(code)


def with_site(site: Path, *arguments: str, cwd: Path) -> Outcome:
    return forked(*arguments, cwd=cwd, PYTHONPATH=str(site))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path where the example's wheel is installed."""
    home = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, home / "plugin", ignore=shutil.ignore_patterns("__pycache__"))
    install(wheel(home / "plugin", home / "wheels"), home / "site")
    return home / "site"


def test_a_variant_in_one_short_module_trains_by_its_name(example: Path, tmp_path: Path) -> None:
    assert len((EXAMPLE / "jemkit_tempered.py").read_text().splitlines()) < 45
    assert (EXAMPLE / "jemkit_tempered.py").read_text().count("from jemkit") == 1
    listed = process("plugins", "list", "--json", cwd=tmp_path, PYTHONPATH=str(example))
    assert listed.err == ""
    rows = [row for row in json.loads(listed.out) if row["name"] == "tempered"]
    assert {row["kind"] for row in rows} == {"backbone", "energy"}
    assert all(row["distribution"] == "jemkit-tempered" for row in rows)
    assert all((row["version"], row["state"]) == ("0.1.0", "ok") for row in rows)
    options = ("--backbone=tempered", "--set=backbone.energy.temperature=4", "--out=here")
    done = with_site(example, "train", *SHORT, *options, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.record["backbone"] == "tempered"
    recipe = json.loads((tmp_path / "here" / "config.json").read_text())["recipe"]
    assert recipe["backbone"]["energy"] == {"use": "tempered", "temperature": 4.0}
    drawn = with_site(example, "sample", "here", "--n=4", "--steps=1", cwd=tmp_path)
    assert drawn.code == 0, drawn.err


@pytest.mark.parametrize("name", ["vitjem", "hmc", "multitargeted"])
def test_each_example_is_a_package_of_one_short_module(name: str) -> None:
    """`make test-guests` builds, installs and tests them."""
    folder = ROOT / "examples" / name
    code = (folder / f"jemkit_{name}.py").read_text()
    assert len(code.splitlines()) < 80
    assert code.count("from jemkit") == 1
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["entry-points"] == {
        "jemkit": {name: f"jemkit_{name}"}, "jemkit_api": {str(API): f"jemkit_{name}"}
    }  # fmt: skip
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == [
        f"jemkit_{name}.py"
    ]
    assert f"jemkit plugins check {name}" in (folder / "README.md").read_text()
    tests = (folder / "tests" / f"test_{name}.py").read_text()
    assert "CHECKS[" in tests
    (guests,) = re.findall(r"^GUESTS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert name in guests.split()


def test_no_plugins_leaves_the_built_in_parts(example: Path, tmp_path: Path) -> None:
    arguments = ("train", "--backbone=tempered", "--no-plugins", "--dry-run")
    done = with_site(example, *arguments, cwd=tmp_path)
    assert done.code == 3
    assert "no backbone 'tempered'" in done.err


def test_a_broken_wheel_is_skipped_with_one_warning(tmp_path: Path) -> None:
    made(tmp_path, "broken-energy", "broken_energy", "import a_module_that_nobody_has\n")
    shown = with_site(tmp_path / "site", "plugins", "list", "--json", cwd=tmp_path)
    assert shown.code == 0
    (warning,) = shown.err.splitlines()
    assert warning.startswith("warning: plug-in 'broken_energy' of broken-energy 0.7 is skipped")
    (fault,) = [row for row in json.loads(shown.out) if row["state"] == "skipped"]
    assert (fault["name"], fault["distribution"]) == ("broken_energy", "broken-energy")
    assert "No module named 'a_module_that_nobody_has'" in fault["fault"]
    dry = with_site(tmp_path / "site", "train", *SHORT, "--dry-run", cwd=tmp_path)
    assert dry.code == 0, dry.err
    assert dry.err == shown.err


def test_two_wheels_with_one_name_are_an_error_that_names_both(tmp_path: Path) -> None:
    for name, module in (("first-stay", "first_stay"), ("second-stay", "second_stay")):
        code = SAMPLER.format(name=name.split("-")[0].title())
        made(tmp_path, name, module, code)
    done = with_site(tmp_path / "site", "train", *SHORT, "--dry-run", cwd=tmp_path)
    assert done.code == 3
    (message,) = done.err.splitlines()
    assert "'stay'" in message
    assert "first-stay" in message
    assert "second-stay" in message
    alone = with_site(tmp_path / "site", "train", *SHORT, "--dry-run", "--no-plugins", cwd=tmp_path)
    assert alone.code == 0, alone.err


def test_the_guide_quotes_the_example_and_its_laws_hold(example: Path) -> None:
    guide = (ROOT / "docs" / "write-a-plugin.md").read_text()
    *quotes, laws = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    module = (EXAMPLE / "jemkit_tempered.py").read_text()
    assert quotes
    assert all(quote in module for quote in quotes)
    for quote in re.findall(r"```toml\n(.*?)```", guide, flags=re.DOTALL):
        assert quote in (EXAMPLE / "pyproject.toml").read_text()
    more = (
        "from jemkit.testing import check_backbone\n"
        "from jemkit import Buffer\n"
        "from jemkit.models.networks import SmallCNN\n"
        "from jemkit_tempered import Tempered\n"
        "check_backbone(Tempered(network=SmallCNN(channels=2), buffer=Buffer(capacity=20)))\n"
    )
    in_a_new_process(executed, f"import sys\nsys.path.insert(0, {str(example)!r})\n{laws}{more}")


def executed(code: str) -> None:
    """The code of a guide, in a process that ends with it."""
    exec(code, {})
