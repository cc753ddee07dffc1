"""The tests marked `cuda`; in a rehearsal, where these skip, one file of others beside them."""

import re
from importlib.util import find_spec

import processes
from records import Record
from stage import KIT, Given


def measure(given: Given, record: Record) -> None:
    chosen = (
        ["tests/models/test_energy.py", "tests/gpu/test_cuda.py"]
        if given.toy
        else ["-m", "cuda", "tests"]
    )
    shared = ["-n", "4", "--dist", "loadfile"] if find_spec("xdist") and not given.toy else []
    report = ["-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    command = processes.python("-P", "-m", "pytest", *report, *shared, *chosen)
    done = processes.run(command, given.left - 2, cwd=KIT)
    counted = re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", done.output)
    record.add(counts={name: int(n) for n, name in counted}, output=done.output)
    if not done.passed:
        raise RuntimeError(f"the tests {done.status}:\n{done.output[-2000:]}")
