"""Runs the tests marked `cuda`; in a rehearsal, where they are skipped, also another file."""

import re
from importlib.util import find_spec
from pathlib import Path

import processes
from records import Record
from stage import KIT, Given

MARK = re.compile(r"mark\.cuda\b")


def marked(folder: Path) -> list[str]:
    """The test files that hold a test marked `cuda`."""
    files = sorted(folder.rglob("test_*.py"))
    return [str(path.relative_to(KIT)) for path in files if MARK.search(path.read_text())]


def measure(given: Given, record: Record) -> None:
    selected = ["tests/models/test_energy.py"] if given.toy else ["-m", "cuda"]
    selected += [name for name in marked(KIT / "tests") if not given.toy or "test_cuda" in name]
    shared = ["-n", "4", "--dist", "worksteal"] if find_spec("xdist") and not given.toy else []
    report = ["-rfEs", "--tb=short", "-p", "no:cacheprovider", "-o", "timeout=60"]
    report += ["-o", "timeout_method=thread"]  # a signal does not reach a blocked C++ call
    command = processes.python("-P", "-m", "pytest", *report, *shared, *selected)
    done = processes.run(command, given.left - 2, cwd=KIT, log=given.out / "tests.txt")
    counted = re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", done.output)
    record.add(counts={name: int(n) for n, name in counted}, output=done.output)
    if not done.passed:
        raise RuntimeError(f"the tests {done.status}:\n{done.output[-2000:]}")
