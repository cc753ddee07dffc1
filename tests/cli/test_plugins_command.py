"""`jemkit plugins new` writes packages that work; `check` names the law that a part violates."""

import json
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from cli_tools import SHORT, jemkit, one_line, process
from guests import install, place

from jemkit import resolve
from jemkit.config import registry
from jemkit.config.eval_settings import options_of
from jemkit.hookspecs import API
from jemkit_cli.plugins.check import MEANINGS, _built, _given
from jemkit_cli.plugins.listing import offers_of
from jemkit_cli.plugins.new import Kind

KINDS = get_args(Kind)
LONGEST = {"backbone": 45}
FAULTY = """
import torch
from jemkit import Options, gradient, hookimpl

class Climb(Options):
    needs_stem: bool = False

    def step(self, energy, x, rng):
        return x + gradient(energy, x)

class Mean(Options):
    needs_stem: bool = False

    def step(self, energy, x, rng):
        return x - x.mean(dim=0)

class Broken(Options):
    needs_stem: bool = False

    def step(self, energy, x, rng):
        raise KeyError("velocity")

class Careless(Options):
    needs_stem: bool = False

    def step(self, energy, x, rng):
        torch.rand(1)
        return x - x.mean(dim=0)

class Distant(Options):
    needs_stem: bool = False

    def step(self, energy, x, rng):
        import a_module_that_nobody_has.inner

@hookimpl
def jemkit_samplers():
    own = {"climb": Climb, "mean": Mean, "broken": Broken}
    return {**own, "careless": Careless, "distant": Distant}
"""
BAD = {
    "syntax": ("def step(:\n", "SyntaxError"),
    "missing": ("import a_module_that_nobody_has\n", "No module named 'a_module_that_nobody_has'"),
    "untyped": (
        "from jemkit import Options\nclass Part(Options):\n    step_size = 0.1\n",
        "non-annotated attribute",
    ),
    "misspelt": (
        "from jemkit import hookimpl\n@hookimpl\ndef jemkit_sampler():\n    return {}\n",
        "jemkit_sampler is not a hook of jemkit (did you mean 'jemkit_samplers'?)",
    ),
    "other": (
        "from jemkit import Options, hookimpl\nclass Part(Options):\n    pass\n"
        "@hookimpl\ndef jemkit_samplers():\n    return {'other': Part}\n",
        "lacks step, needs_stem",
    ),
}
"""Plug-ins that are skipped, and why."""


def name_of(kind: str) -> str:
    return f"my_{kind}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of each kind, all of them installed in `site` beside faulty ones."""
    home = tmp_path_factory.mktemp("plugins")
    for kind in KINDS:
        done = jemkit(
            "plugins", "new", name_of(kind), "--kind", kind, "--out", str(home / name_of(kind))
        )
        assert done.code == 0, done.err
        install(home / name_of(kind), home / "site")
    place(home / "site", "faulty", FAULTY, {"jemkit": {"faulty": "faulty"}})
    for name, (code, _) in BAD.items():
        place(home / "site", name, code, {"jemkit": {name: name}})
    entries = {"jemkit": {"later": "later"}, "jemkit_api": {str(API + 1): "later"}}
    place(home / "site", "later", "raise RuntimeError('imported')\n", entries)
    return home


@pytest.fixture
def site(home: Path) -> Iterator[Path]:
    """The folder of the plug-ins on the path; none of them ends the process, so none is probed."""
    loaded = {*sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "lethal", lambda guests: [""] * len(guests))
        patch.syspath_prepend(home / "site")
        patch.chdir(home)
        yield home / "site"
    for name in {*sys.modules} - loaded:
        if name.startswith("jemkit_my_") or name in {"faulty", *BAD}:
            del sys.modules[name]


def test_new_packages_are_short_and_whole(home: Path) -> None:
    for kind in KINDS:
        package = home / name_of(kind)
        files = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()}
        module = f"jemkit_{name_of(kind)}.py"
        rest = {"pyproject.toml", "README.md", "tests/test_laws.py", ".github/workflows/test.yml"}
        assert files == {module, *rest}
        lines = (package / module).read_text().splitlines()
        assert len(lines) < LONGEST.get(kind, 60), kind
        project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
        assert project["entry-points"]["jemkit_api"] == {str(API): f"jemkit_{name_of(kind)}"}
        assert "$" not in (package / "README.md").read_text()
        ci = (package / ".github" / "workflows" / "test.yml").read_text()
        assert "python-version: ${{ matrix.python }}\n" in ci
        assert ci.endswith(f"- run: jemkit plugins check {name_of(kind)}\n")


def test_new_packages_pass_the_linter(home: Path) -> None:
    for kind in KINDS:
        command = [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--no-cache",
            "--select=E,F,I,B,UP,SIM,RUF,C4,PT,RET",
        ]
        done = subprocess.run(
            command, cwd=home / name_of(kind), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_the_test_of_a_new_package_passes(site: Path, kind: str) -> None:
    tests = runpy.run_path(str(site / f"tests_of_{name_of(kind)}" / "test_laws.py"))
    tests["test_it_keeps_the_laws_of_its_kind"]()


@pytest.mark.usefixtures("site")
def test_new_parts_train_and_are_evaluated_by_name() -> None:
    short = (*SHORT, "--dataset=my_dataset", "--set=data.images=90", "--json")
    parts = ("--backbone=my_backbone", "--sampler=my_sampler", "--updater=my_updater")
    distance = "--set=objective.distance.use=my_distance"
    done = jemkit("train", *short, *parts, distance, "--out=jem")
    assert done.code == 0, done.err
    assert done.record["backbone"] == "my_backbone"
    short = tuple(option for option in short if "adv_steps" not in option)
    done = jemkit("train", *short, "--objective=my_objective", "--out=own")
    assert done.code == 0, done.err
    judged = ("--attack=my_attack", "--max-images=10", "--only=robustness", "--only=my_evaluator")
    done = jemkit("evaluate", "own", *judged, "--indicators=off", "--json")
    assert done.code == 0, done.err
    assert "my_attack" in done.out
    assert "my_evaluator" in done.out


@pytest.mark.usefixtures("site")
def test_faulty_plug_ins_are_named_and_the_others_stay() -> None:
    done = jemkit("plugins", "list", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    faults = {row["name"]: row["fault"] for row in rows if row["state"] == "skipped"}
    assert faults.keys() == {*BAD, "later"}
    for name, (_, reason) in BAD.items():
        assert reason in faults[name], name
    assert faults["later"] == (
        f"is written for API {API + 1}, and this is API {API}: install a version for API {API}"
    )
    assert {name_of(kind) for kind in KINDS} <= {row["name"] for row in rows}
    done = jemkit("plugins", "check", "later")
    assert "the plug-in later is skipped: is written for API" in done.err
    assert done.code == 3


@pytest.mark.usefixtures("site")
def test_a_package_that_a_part_imports_late_is_named() -> None:
    done = jemkit("train", *SHORT, "--sampler=distant", "--out=distant")
    assert done.code == 3, done.err
    assert "Traceback" not in done.err
    message = "a part of this command needs the package a_module_that_nobody_has: install it"
    assert done.err.splitlines()[-1] == f"error: {message}"


@pytest.mark.usefixtures("site")
def test_check_names_the_law_its_smallest_counterexample_and_its_meaning() -> None:
    done = jemkit("plugins", "check", "faulty", "--json")
    assert done.code == 1, done.err
    parts = {part["name"]: part for part in done.record["parts"]}
    first = {name: part["violations"][0] for name, part in parts.items()}
    assert first["climb"]["law"] == "descent"
    assert "E rose by" in first["climb"]["result"]
    assert (first["mean"]["law"], first["mean"]["images"]) == ("rows", 2)
    assert first["broken"]["result"] == parts["broken"]["stopped"]
    assert first["broken"]["result"] == "it raised KeyError: 'velocity'"
    assert all(one["meaning"] == MEANINGS[one["law"]] for one in first.values())
    shown = jemkit("plugins", "check", "mean")
    assert shown.code == 1
    for text in (
        "VIOLATED",
        "smallest counterexample (seed 0, images: 2): it moved",
        "what it means: If images",
    ):
        assert text in shown.out


@pytest.mark.usefixtures("site")
def test_check_goes_on_after_a_violated_law_and_lists_all() -> None:
    done = jemkit("plugins", "check", "careless", "--json")
    assert done.code == 1, done.err
    (part,) = done.record["parts"]
    violated = {(one["law"], one["images"]) for one in part["violations"]}
    assert violated == {("generator", 1), ("rows", 2)}
    laws = [law["law"] for law in part["laws"] if not law["holds"]]
    assert laws == ["generator", "rows"]
    assert (part["laws"][-1]["law"], part["stopped"]) == ("descent", None)
    shown = jemkit("plugins", "check", "careless").out
    assert shown.count("what it means: ") == 2
    assert f"2 of {len(part['laws'])} requirements are violated" in shown


def test_check_lists_every_requirement_of_a_part_that_keeps_them() -> None:
    done = jemkit("plugins", "check", "sgld", "--set=sgld.noise=0.1", "--no-plugins", "--json")
    assert done.code == 0, done.err
    parts = {part["kind"]: part for part in done.record["parts"]}
    assert parts.keys() == {"sampler", "ascent"}
    part = parts["sampler"]
    assert (part["violations"], part["stopped"]) == ([], None)
    laws = {law["law"] for law in part["laws"]}
    assert {"descent", "rows", "box", "generator", "modes", "gradients"} <= laws
    assert "requirements hold" in jemkit("plugins", "check", "sgld", "--no-plugins").out


def test_check_takes_the_options_of_the_parts_of_a_part_as_train_does() -> None:
    parts = registry.installed(third_party=False)
    texts = ["jem.sampler.step_size=0.5", "jem.sampler.use=pyld", "jem.sampler.inner_steps=3",
             "jem.network.use=wrn-10-1"]  # fmt: skip
    chosen = [o for o in offers_of(parts) if (o.name, o.kind) == ("jem", "backbone")]
    part = _built(chosen[0], options_of(texts)["jem"], parts)
    of_train = resolve(parts, overrides=["backbone.use=jem", *(
        text.replace("jem.", "backbone.", 1) for text in texts)])  # fmt: skip
    assert part.sampler == of_train.recipe.backbone.sampler  # type: ignore[attr-defined]
    assert (part.sampler.step_size, part.sampler.inner_steps, part.network.depth) == (0.5, 3, 10)
    refused = one_line(jemkit("plugins", "check", "jem", "--set=jem.sampler.nois=1"), 3)
    assert "nois: no such option (did you mean 'noise'" in refused
    assert "use: no such option" in one_line(
        jemkit("plugins", "check", "jem", "--set=jem.use=x"), 3
    )


def test_an_option_goes_to_the_part_of_the_name_that_has_it() -> None:
    chosen = [o for o in offers_of(registry.installed(third_party=False)) if o.name == "jem"]
    given = {"jem": {"buffer": {}, "nonsense": 1}}
    sets = {offer.kind: _given(offer, chosen, given) for offer in chosen}
    assert sets == {"backbone": {"buffer": {}, "nonsense": 1}, "objective": {"nonsense": 1}}


def test_a_package_in_this_folder_is_to_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zigzag").mkdir()
    (tmp_path / "zigzag" / "pyproject.toml").write_text("")
    message = (
        "no part or plug-in 'zigzag'; to install the one in this folder: pip install -e zigzag"
    )
    assert message in one_line(jemkit("plugins", "check", "zigzag", "--no-plugins"), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sgldd"], "no part or plug-in 'sgldd' (did you mean 'sgld'?)"),
        (["sgld", "--set=mala.noise=1"], "--set mala: expected an option of sgld"),
        (["sgld", "--set=sgld.nois=1"], "sampler sgld: nois: no such option (did you mean 'noise'"),
        (["timm"], "network timm: model: is required; set its options by --set timm.OPTION=VALUE"),
    ],
)
def test_check_refuses_what_it_cannot_test(arguments: list[str], message: str) -> None:
    assert message in one_line(jemkit("plugins", "check", *arguments, "--no-plugins"), 3)


def test_every_law_has_a_meaning() -> None:
    root = Path(__file__).parents[2] / "jemkit" / "testing"
    assert MEANINGS.keys() == laws_in(root) | {"runs"}


def laws_in(folder: Path) -> set[str]:
    """The laws that the checks name: the third argument of `require`."""
    import ast

    names = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                law = node.args[2]
                names |= {law.value} if isinstance(law, ast.Constant) else set()
    return names | {"modes", "gradients", "weights"}  # by name in `untouched`


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["Jitter", "--kind=sampler"], 2, "'Jitter' cannot be the name of a part"),
        (["my-jitter", "--kind=sampler"], 2, "one lower-case word"),
        (["2x", "--kind=sampler"], 2, "such as my_sampler"),
        (["lambda", "--kind=sampler"], 2, "cannot be the name"),
        (["true", "--kind=sampler"], 2, "--set KEY=true, reads it as a value that is not text"),
        (["nan", "--kind=distance"], 2, "choose another, such as my_nan"),
        (["a" * 41, "--kind=tracker"], 2, "of at most 40 characters"),
        (["sgld", "--kind=backbone"], 3, "already a part 'sgld', the sampler of jemkit"),
        (["plugins", "--kind=backbone"], 3, "the module jemkit_plugins is already installed"),
        (["jitter", "--kind=sampler", "--out=there"], 2, "there already exists; choose another"),
    ],
)
def test_new_refuses_what_would_not_work(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert message in one_line(jemkit("plugins", "new", *arguments), code)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_new_refuses_an_unknown_kind_and_lists_the_known_ones() -> None:
    done = jemkit("plugins", "new", "jitter", "--kind=network")
    assert done.code == 2
    assert "backbone" in done.err


@pytest.mark.slow
def test_a_new_package_installs_without_a_network_and_passes_a_strict_type_check(
    home: Path,
) -> None:
    target = home / "target"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    package = str(home / "my_backbone")
    subprocess.run([*pip, "--no-index", "--target", str(target), package], check=True)
    done = process("train", *SHORT, "--backbone=my_backbone", cwd=home, PYTHONPATH=str(target))
    assert done.code == 0, done.err
    modules = [str(home / name_of(kind) / f"jemkit_{name_of(kind)}.py") for kind in KINDS]
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", *modules]
    typed: Any = subprocess.run(command, capture_output=True, text=True, check=False)
    assert typed.returncode == 0, typed.stdout
