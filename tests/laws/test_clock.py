"""No test's outcome depends on the clock: what it waits for, it waits for by `waiting.until`."""

import ast
from functools import cache
from pathlib import Path

from toys import root
from waiting import SAFETY

HERE = root() / "tests"
CLOCKS = {"time.monotonic", "time.perf_counter", "time.time", "time.process_time"}
MAY_READ_A_CLOCK = {
    "support/waiting.py",  # the one that waits
    "support/browser.py",  # the same, for a page
    "faults/lab.py",  # kills after some share of the time, where every outcome is right
    "metrics/test_attack_cache.py",  # the same net as waiting's, inside of what is polled
}


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in HERE.rglob("*.py")}


def offenders(wrong: type[ast.AST]) -> list[tuple[Path, ast.AST]]:
    return [(p, n) for p, tree in trees().items() for n in ast.walk(tree) if isinstance(n, wrong)]


def test_no_test_reads_a_clock() -> None:
    collected = {
        path.relative_to(HERE).as_posix()
        for path, node in offenders(ast.Attribute)
        if ast.unparse(node) in CLOCKS
    }
    assert collected - MAY_READ_A_CLOCK == set()


def test_no_limit_of_time_is_one_that_work_on_a_busy_machine_could_reach() -> None:
    collected = []
    for path, node in offenders(ast.Call):
        assert isinstance(node, ast.Call)
        given = [word.value for word in node.keywords if word.arg in ("timeout", "seconds")]
        given += node.args if ast.unparse(node.func) == "pytest.mark.timeout" else []
        limits = [value.value for value in given if isinstance(value, ast.Constant)]
        collected += [
            f"{path}:{node.lineno}"
            for limit in limits
            if isinstance(limit, int | float) and limit < SAFETY
        ]
    assert collected == []
