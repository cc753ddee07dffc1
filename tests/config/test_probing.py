"""A plug-in of somebody else's that misbehaves in whatever way is named, and no other suffers."""

import json
import os
import signal
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Outcome
from forked import Forked, forked
from waiting import until

from jemkit import Options, hookimpl
from jemkit.config import probing
from jemkit.config.probing import contained, error_line
from jemkit.config.registry import Plugin, registry_of
from jemkit.runtime.files import read_json

GOOD = """
import os
from jemkit import Options, hookimpl

with open(os.environ["IMPORTS"], "a") as log:
    log.write("good\\n")
print("a word of the plug-in", flush=True)

class Stay(Options):
    needs_stem: bool = False

    def step(self, energy, x, rng):
        return x

@hookimpl
def jemkit_samplers():
    print("a word of its hook")
    return {"stay": Stay}
"""
WRONG = {
    "skips": ("import pytest; pytest.importorskip('nothing_of_this_name')", "Skipped"),
    "breaks": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "generator": ("raise GeneratorExit('now')", "GeneratorExit: now"),
    "leaves": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "mute": ("class Odd(Exception):\n    def __str__(self): raise OSError\nraise Odd", "Odd: (w"),
    "gone": ("import os; os._exit(0)", "ends the interpreter when it is imported (exit code 0)"),
    "aborts": ("import os; os.abort()", "ends the interpreter when it is imported (SIGABRT)"),
    "faults": ("import ctypes; ctypes.string_at(0)", "when it is imported (SIGSEGV)"),
    "endless": (
        "import signal; signal.raise_signal(signal.SIGALRM)", "its import does not end within 60 s"
    ),
    "thread": (  # it cuts its own ten seconds to end short
        "import threading, time\n"
        "import jemkit.config.probe_child as child\n"
        "child.END = 1\n"
        "threading.Thread(target=lambda: time.sleep(1e6), name='busy').start()",
        "it keeps the process from ending (busy is still running)",
    ),
    "exits": ("import atexit, os; atexit.register(os._exit, 3)", "itself (exit code 3)"),
    "dtype": (
        "import torch; torch.set_default_dtype(torch.float64)", "changes torch's default dtype"
    ),
    "hook": (
        "from jemkit import hookimpl\n@hookimpl\ndef jemkit_samplers():\n    import os\n"
        "    os._exit(1)",
        "ends the interpreter when it is imported (exit code 1)",
    ),
    "schema": (
        "from typing import Any\nfrom jemkit import Options, hookimpl\n"
        "class Part(Options):\n    needs_stem: bool = False\n    what: Any = object()\n"
        "    def step(self, energy, x, rng): return x\n"
        "@hookimpl\ndef jemkit_samplers(): return {'part': Part}",
        "the options of the sampler 'part' have no schema",
    ),
}  # fmt: skip


def place(site: Path, name: str, code: str) -> None:
    """What an installer leaves of a package with one module."""
    about = site / f"{name}-0.7.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.7\n")
    (about / "entry_points.txt").write_text(f"[jemkit]\n{name} = {name}\n")
    (site / f"{name}.py").write_text(code)


def listed(site: Path, cwd: Path, *more: str) -> Outcome:
    log = {"IMPORTS": str(cwd / "imports")}
    return forked(
        "plugins", "list", "--json", *more, cwd=cwd, PYTHONPATH=str(site),
        JEMKIT_CACHE=str(cwd / "cache"), **log,
    )  # fmt: skip


def imports(cwd: Path) -> int:
    return len((cwd / "imports").read_text().splitlines())


def test_whatever_plug_ins_do_they_are_named_and_the_others_stay(tmp_path: Path) -> None:
    site = tmp_path / "site"
    place(site, "good", GOOD)
    for name, (code, _) in WRONG.items():
        place(site, name, code)
    done = listed(site, tmp_path)
    assert done.code == 0, done.err
    rows = json.loads(done.out)  # what plug-ins print is not among it
    assert "a word of its hook" in done.err
    assert ("stay", "ok") in {(row["name"], row["state"]) for row in rows}
    faults = {row["name"]: row["fault"] for row in rows if row["state"] == "skipped"}
    assert faults.keys() == WRONG.keys()
    for name, (_, reason) in WRONG.items():
        assert reason in faults[name], name
    assert imports(tmp_path) == 2  # by the child that probes it, and by the command
    again = listed(site, tmp_path)
    assert json.loads(again.out) == rows
    assert imports(tmp_path) == 3  # what is known is not probed again


def test_a_plug_in_that_changed_is_probed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probed(entries: Sequence[EntryPoint]) -> list[probing.Verdict]:
        """In place of a child process: the file's content."""
        return [probing.Verdict((tmp_path / f"{e.value}.py").read_text()) for e in entries]

    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probing, "_probed", probed)
    monkeypatch.syspath_prepend(tmp_path)
    guest = probing.Guest(EntryPoint("changing", "changing", "guests"), "guests", "1")
    (tmp_path / "changing.py").write_text("")
    assert probing.lethal([guest]) == [""]
    (tmp_path / "changing.py").write_text("longer")
    assert probing.lethal([guest]) == ["longer"]
    (tmp_path / "changing.py").write_text("length")
    os.utime(tmp_path / "changing.py", ns=(1, 1))  # of the same size, at another time
    assert probing.lethal([guest]) == ["length"]
    monkeypatch.setattr(probing, "_probed", None)
    assert probing.lethal([guest]) == ["length"]  # known, as long as nothing changes


def test_an_interrupt_while_a_plug_in_is_probed_or_imported_ends_with_130(tmp_path: Path) -> None:
    waits = 'import os, time\nopen(os.environ["IMPORTS"], "a").write("x\\n")\n{}time.sleep(1e6)\n'
    site = tmp_path / "site"
    place(site, "waits", waits.format(""))
    env = {
        "PYTHONPATH": str(site),
        "JEMKIT_CACHE": str(tmp_path / "cache"),
        "IMPORTS": str(tmp_path / "log"),
    }

    def interrupted(ready: int) -> None:
        running = Forked("plugins", "list", cwd=tmp_path, **env)
        log = tmp_path / "log"
        until(lambda: log.exists() and len(log.read_text()) >= ready, "the import")
        running.send_signal(signal.SIGINT)
        assert running.outcome() == (130, "", "interrupted\n")

    interrupted(2)  # by the child
    parent = (
        "import jemkit.config.probing, sys\nif 'jemkit_cli.app' not in sys.modules: sys.exit()\n"
    )
    (tmp_path / "log").unlink()
    place(site, "waits", parent + waits.format(""))  # the child goes on
    interrupted(2)


class Kind:
    """A plug-in whose one hook is given."""

    def __init__(self, hook: str, gives: Any) -> None:
        def hooked() -> Any:
            return gives() if callable(gives) and not isinstance(gives, type) else gives

        setattr(self, hook, hookimpl(hooked))


class Still(Options):
    needs_stem: bool = False

    def step(self, energy: Any, x: Any, rng: Any) -> Any:
        return x


class Meta(type(Options)):  # type: ignore[misc]
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise RuntimeError("no attributes today")


class Tricky(Options, metaclass=Meta):
    pass


def raises(error: BaseException) -> Any:
    def hook() -> Any:
        raise error

    return hook


FAULTS: list[tuple[str, Any, str]] = [
    (
        "jemkit_samplers",
        None,
        "jemkit_samplers returned None; expected a mapping of names to classes",
    ),
    ("jemkit_recipes", None, "jemkit_recipes returned None; expected a mapping of names to layers"),
    ("jemkit_recipes", ["preset/x"], "expected a mapping"),
    ("jemkit_recipes", {"preset/x": 3}, "'preset/x' is 3; expected a Path, or tables"),
    ("jemkit_recipes", {"preset/x": "x.toml"}, "expected a Path, or tables"),
    ("jemkit_recipes", {3: {}}, "a recipe layer belongs to 3; expected one of data/..."),
    ("jemkit_recipes", {"presets/x": {}}, "expected one of data/..."),
    ("jemkit_recipes", {"preset/x": {"run": 3}}, "expected a Path, or tables"),
    ("jemkit_recipes", {"preset/x": {"run": {"epochs": {1}}}}, "expected a Path, or tables"),
    ("jemkit_recipes", {"preset/x": Path("nowhere.toml")}, "nowhere.toml, which is missing"),
    ("jemkit_samplers", {3: Still}, "the sampler name 3 is not one lower-case word"),
    ("jemkit_samplers", {"still": None}, "the sampler 'still' is None; expected a class"),
    ("jemkit_samplers", {"odd": Tricky}, "no attributes today"),
    ("jemkit_samplers", raises(SystemExit(1)), "SystemExit: 1"),
    ("jemkit_samplers", raises(GeneratorExit()), "GeneratorExit"),
]


@pytest.mark.parametrize(("hook", "gives", "reason"), FAULTS)
def test_a_hook_that_gives_or_raises_what_it_may_not_is_named(
    hook: str, gives: Any, reason: str
) -> None:
    good = Plugin("good", Kind("jemkit_samplers", {"stay": Still}), "alpha")
    registry = registry_of([good, Plugin("wrong", Kind(hook, gives), "beta")])
    (fault,) = registry.faults
    assert (fault.plugin, fault.distribution) == ("wrong", "beta")
    assert reason in fault.reason
    assert list(registry["sampler"]) == ["stay"]


def test_what_runs_contained_prints_elsewhere_and_leaves_handlers_alone(capfd: Any) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with contained():
        print("printed")
        os.write(1, b"below python\n")
        os.system("echo by a child")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    out, err = capfd.readouterr()
    assert out == ""
    assert all(words in err for words in ("printed", "below python", "by a child"))


def test_an_error_whose_message_fails_is_reported_by_its_kind() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise SystemExit

    assert error_line(Mute()).startswith("Mute: (")
    assert error_line(ValueError("x" * 10_000)).startswith("ValueError: xxx")
    assert len(error_line(ValueError("x" * 10_000))) <= 500


def test_a_hook_given_as_a_mapping_of_any_kind_is_taken_in() -> None:
    class Names(Mapping[str, Any]):
        def __getitem__(self, name: str) -> Any:
            return {"stay": Still}[name]

        def __iter__(self) -> Any:
            return iter(["stay"])

        def __len__(self) -> int:
            return 1

    registry = registry_of([Plugin("good", Kind("jemkit_samplers", Names()))])
    assert registry.faults == []
    assert list(registry["sampler"]) == ["stay"]


def test_a_plugin_that_was_not_probed_is_probed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(probing, "LAST", 0.0)
    guests = [probing.Guest(EntryPoint(m, m, "guests"), "guests", "1") for m in ("json", "csv")]
    assert probing.lethal(guests) == ["its import does not end", ""]
    (cached,) = (tmp_path / "plugins").iterdir()
    assert read_json(cached)["plugin"] == "json"


LARGE = {
    "killed": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "its import was killed (SIGKILL)"
    ),
    "refused": ("raise MemoryError", ""),
    "schema": (
        "from jemkit import Options, hookimpl\n"
        "class Part(Options):\n"
        "    needs_stem: bool = False\n"
        "    def step(self, energy, x, rng): return x\n"
        "    @classmethod\n"
        "    def model_json_schema(cls, *args, **more): raise MemoryError\n"
        "@hookimpl\n"
        "def jemkit_samplers(): return {'part': Part}", ""
    ),
    "aborted": ("import os\nos.abort()", "it ends the interpreter when it is imported (SIGABRT)"),
    "json": ("", ""),
}  # fmt: skip


def test_a_plugin_whose_import_ran_out_of_memory_is_probed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    for name, (code, _) in LARGE.items():
        if code:
            (tmp_path / f"{name}.py").write_text(code)
    guests = [probing.Guest(EntryPoint(m, m, "guests"), "guests", "1") for m in LARGE]
    faults = probing.lethal(guests)
    assert all(f.startswith(w) for f, (_, w) in zip(faults, LARGE.values(), strict=True))
    assert faults[-1] == ""
    cached = {read_json(path)["plugin"] for path in (tmp_path / "cache" / "plugins").iterdir()}
    assert cached == {"aborted", "json"}
