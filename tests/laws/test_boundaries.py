"""Who may import whom, and what no file may hold."""

import ast
import re
import tokenize
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from toys import root

PACKAGES = {
    "jemkit": root() / "jemkit",
    "jemkit_plugins": root() / "plugins" / "jemkit_plugins",
    "jemkit_cli": root() / "cli" / "jemkit_cli",
}
OWNER = {path: package for package, at in PACKAGES.items() for path in at.rglob("*.py")}
FILES = sorted(OWNER)
OURS = set(PACKAGES)
PROJECT = (root() / "pyproject.toml").read_text()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def over(files: list[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """A rule on one file as one test over all of them, which lists the offenders."""

    def one_test(rule: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            offenders: dict[str, str] = {}
            for path in files:
                try:
                    rule(path)
                except AssertionError as error:
                    offenders[path.relative_to(root()).as_posix()] = str(error)
            assert offenders == {}

        test.__name__, test.__doc__ = rule.__name__, rule.__doc__
        return test

    return one_test


def imports(tree: ast.AST) -> set[str]:
    """Every module that some import names, wherever it stands."""
    collected: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            collected |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            collected |= {
                node.module or "",
                *(f"{node.module}.{alias.name}" for alias in node.names),
            }
        elif (
            isinstance(node, ast.Call)
            and name_of(node.func).endswith("import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            collected.add(str(node.args[0].value))
    return collected


def at_import(tree: ast.Module) -> set[str]:
    """The modules that come in when this one is imported."""
    collected: set[str] = set()
    queue: list[ast.AST] = list(tree.body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            collected |= imports(node)
        queue += ast.iter_child_nodes(node)
    return collected


def tops(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def name_of(node: ast.AST) -> str:
    """`torch.manual_seed` of an attribute, else its last name."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


ALLOWED = {
    "jemkit": {"jemkit"},
    "jemkit_plugins": {"jemkit", "jemkit_plugins"},
    "jemkit_cli": {"jemkit", "jemkit_cli"},
}


@over(FILES)
def test_a_package_imports_only_what_it_may(path: Path) -> None:
    assert tops(imports(tree_of(path))) & OURS <= ALLOWED[OWNER[path]]


@over([p for p in FILES if OWNER[p] == "jemkit_plugins"])
def test_a_plug_in_imports_of_plug_ins_its_own_folder_or_one_that_offers_no_part(
    path: Path,
) -> None:
    home = PACKAGES["jemkit_plugins"]
    for name in imports(tree_of(path)):
        top, _, rest = name.partition(".")
        if top == "jemkit_plugins":
            folder = home / rest.split(".")[0]
            assert folder.is_dir(), name
            assert folder in path.parents or f'"jemkit_plugins.{folder.name}"' not in PROJECT, name


@over(FILES)
def test_imports_are_absolute(path: Path) -> None:
    levels = {n.level for n in ast.walk(tree_of(path)) if isinstance(n, ast.ImportFrom)}
    assert levels <= {0}


def starting_with(start: str) -> list[Path]:
    """The files of the command that come in with one of its modules."""
    home = PACKAGES["jemkit_cli"].parent
    reached: dict[str, Path] = {}
    queue = [start]
    while queue:
        name = queue.pop()
        at = home.joinpath(*name.split("."))
        path = next((p for p in (at.with_suffix(".py"), at / "__init__.py") if p in OWNER), None)
        if path is not None and name not in reached:
            reached[name] = path
            queue += [name.rpartition(".")[0], *at_import(tree_of(path))]
    return [path for path in reached.values() if OWNER[path] == "jemkit_cli"]


@over(sorted(starting_with("jemkit_cli.commands") + starting_with("jemkit_cli.app")))
def test_the_command_line_imports_the_library_inside_its_functions(path: Path) -> None:
    assert not tops(at_import(tree_of(path))) & {"jemkit", "torch", "jemkit_plugins"}


@over(FILES)
def test_torchvision_comes_in_by_one_door(path: Path) -> None:
    if path != PACKAGES["jemkit"] / "runtime" / "torchvision_compat.py":
        assert "torchvision" not in tops(imports(tree_of(path)))


SLOW = {"torchvision", "lpips", "matplotlib", "sklearn", "timm", "pyautoattack", "torch_fidelity"}
SLOW |= {"wandb", "mlflow", "tensorboard"}


ESTIMATOR = PACKAGES["jemkit"] / "training" / "classifier.py"
"""Derives from scikit-learn's classes."""


@over(FILES)
def test_what_one_part_needs_is_imported_where_it_is_used(path: Path) -> None:
    needed = {"sklearn"} if path == ESTIMATOR else set()
    assert tops(at_import(tree_of(path))) & SLOW == needed
    assert "jemkit.training.classifier" not in at_import(tree_of(path))


@over(FILES)
def test_nobody_unpickles(path: Path) -> None:
    assert not tops(imports(tree_of(path))) & {"dill", "cloudpickle", "joblib", "shelve"}
    names = {name_of(n) for n in ast.walk(tree_of(path)) if isinstance(n, ast.Attribute)}
    assert {n for n in names if n.startswith("pickle.")} <= {"pickle.UnpicklingError"}
    for call in calls(path, "torch.load"):
        safe = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert safe.get("weights_only") == "True"


def calls(path: Path, *names: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and name_of(node.func) in names
    ]


GLOBAL = (
    "torch.manual_seed",
    "torch.seed",
    "torch.random.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
)


@over(FILES)
def test_nobody_draws_from_random_state_of_the_process(path: Path) -> None:
    assert not calls(path, *GLOBAL)
    assert not tops(imports(tree_of(path))) & {"random"}
    names = {name_of(n) for n in ast.walk(tree_of(path)) if isinstance(n, ast.Attribute)}
    assert not {n for n in names if n.startswith(("np.random", "numpy.random"))}
    drawn = calls(path, *(f"torch.{f}" for f in ("rand", "randn", "randint", "randperm", "normal")))
    for call in drawn:
        assert "generator" in {k.arg for k in call.keywords}, ast.unparse(call)
    for like in ("torch.rand_like", "torch.randn_like", "torch.randint_like", "torch.bernoulli"):
        assert not calls(path, like)


OPENERS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "touch", "truncate"}
BY_PATH = {"load", "loadtxt", "fromfile", "memmap", "copyfile", "copy"}
"""Functions of torch, numpy and shutil that open what they are given by its path."""

CLASSES = {"RunFolder"}
"""Whose `open` opens no file."""

OPENED_ELSEWHERE = {
    ("opening.py", "os.open"),  # the one module that opens
    ("files.py", "os.open"),  # a folder, to sync it
    ("lock.py", "os.open"),  # a folder, to lock it
    ("__main__.py", "os.open"),  # os.devnull
    ("process.py", "os.open"),
    ("extras.py", "distribution.read_text"),  # of this package's own metadata
    ("mapped.py", "np.memmap"),  # of a file that is open
    ("files.py", "archive.open"),  # inside an archive that is open
    ("page.py", "files.joinpath.read_text"),  # of this package's own resources
    ("charts.py", "files.joinpath.read_text"),
    ("pixels.py", "os.open"),  # which takes regular files alone
    ("pixels.py", "Image.open"),
    ("datasets.py", "np.loadtxt"),  # scikit-learn's own file
    ("checkpoint.py", "shutil.copyfile"),  # of files that it has just written
}


@over(FILES)
def test_files_are_opened_by_one_module_which_takes_no_fifo_and_writes_through_no_link(
    path: Path,
) -> None:
    """A file of a run, or any that a user names, may be a stranger's."""
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        owner, _, last = called(node.func).rpartition(".")
        if owner in CLASSES or (path.name, f"{owner}.{last}") in OPENED_ELSEWHERE:
            continue
        by_path = last in BY_PATH and owner in {"torch", "np", "numpy", "shutil"}
        method = last in OPENERS and isinstance(node.func, ast.Attribute)
        if last == "open" or by_path or method:
            assert "BytesIO(" in ast.unparse(node), ast.unparse(node)


def called(node: ast.AST) -> str:
    """The dotted name of a function that is called, through the calls before it."""
    if isinstance(node, ast.Call):
        return called(node.func)
    if isinstance(node, ast.Attribute):
        return f"{called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@over(FILES)
def test_no_mistake_of_a_user_is_an_assertion(path: Path) -> None:
    assert not [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.Assert)]


@over(FILES)
def test_only_an_updater_calls_backward(path: Path) -> None:
    methods = {
        n.func.attr
        for n in ast.walk(tree_of(path))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    }
    assert path.name == "updaters.py" or "backward" not in methods


@over(FILES)
def test_modes_change_only_through_their_context_managers(path: Path) -> None:
    """`model.train()` at the start of a run is the one exception."""
    allowed = {"modes.py": {"train", "eval"}, "trainer.py": {"train"}}.get(path.name, set())
    if "testing" in path.parts:
        allowed = {"train", "eval"}
    for node in ast.walk(tree_of(path)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in {"train", "eval"}
            and name_of(node.func).split(".")[-2].endswith(("model", "network", "module", "net"))
        ):
            assert node.func.attr in allowed, ast.unparse(node)


@over(FILES)
def test_no_bare_pixel_fraction_stands_in_the_code(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            numbers = [n.value for n in (node.left, node.right) if isinstance(n, ast.Constant)]
            assert len(numbers) < 2 or numbers[1] != 255, ast.unparse(node)


@over(FILES)
def test_a_file_has_one_subject_and_at_most_400_lines(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400
    assert path.name == "__init__.py" or ast.get_docstring(tree_of(path))


@over(FILES)
def test_a_function_fits_on_a_screen(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            first, last = node.body[0].lineno, node.end_lineno or 0
            assert last - first <= 45, node.name


@over(FILES)
def test_nothing_is_left_for_later_without_an_issue(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX)\b(?!.*#\d+)", text)


VAGUE = "found told kept seen asked anew care exam checkup heard lent dealt alike plainly ledger"
VAGUE_NAMES = re.compile(rf"(?:^|_)(?:{VAGUE.replace(' ', '|')})(?:$|_)", re.IGNORECASE)
"""Words in an identifier that say nothing about what it holds."""

SPELT_ELSEWHERE = {"found_inf"}
"""Names of torch."""

KEYS = {("outputs.py", "found"), ("findings.py", "found")}
"""Keys of a record."""

BENCHMARKS = sorted((root() / "benchmarks").rglob("*.py"))
TESTS = sorted((root() / "tests").rglob("*.py"))


@over([*FILES, *BENCHMARKS, *TESTS])
def test_a_name_says_what_it_holds(path: Path) -> None:
    with path.open("rb") as file:
        names = {t.string for t in tokenize.tokenize(file.readline) if t.type == tokenize.NAME}
    names = {n for n in names - SPELT_ELSEWHERE if (path.name, n) not in KEYS}
    assert sorted(filter(VAGUE_NAMES.search, names)) == []


def test_a_rule_names_every_file_that_breaks_it() -> None:
    def rule(path: Path) -> None:
        assert path.name != "errors.py", "its name"

    with pytest.raises(AssertionError, match=r"jemkit/errors.py.*its name"):
        over(FILES)(rule)()


def test_every_package_is_typed_and_its_folder_is_none() -> None:
    for at in PACKAGES.values():
        assert (at / "py.typed").exists()
    for folder in ("plugins", "cli", "tests", "docs"):
        assert not (root() / folder / "__init__.py").exists()


def test_importing_the_library_loads_no_plug_in_and_nothing_slow() -> None:
    import subprocess
    import sys

    code = "import sys, jemkit; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root()
    )
    loaded = set(done.stdout.split())
    assert "jemkit" in loaded
    assert not loaded & {*SLOW, "jemkit_plugins", "jemkit_cli"}


def test_every_module_of_plug_ins_is_an_entry_point_or_helps_one() -> None:
    home = PACKAGES["jemkit_plugins"]
    for path in home.rglob("*.py"):
        tree = tree_of(path)
        hooks = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[:7] == "jemkit_"]
        if hooks:
            plugin = path.relative_to(home).with_suffix("").parts[0]
            assert f'"jemkit_plugins.{plugin}"' in PROJECT
