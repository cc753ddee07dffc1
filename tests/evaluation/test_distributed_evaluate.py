"""One evaluation, or one drawing, by several processes: what one process alone finds."""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import SHORT, Outcome, jemkit
from ranks import every_rank, torchrun

from jemkit import ConfigError
from jemkit.runtime import distributed
from jemkit.sampling.fresh import TOGETHER

PGD = ("--attack", "pgd", "--only", "robustness", "--set", "robustness.indicators=false")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on digits."""
    out = tmp_path_factory.mktemp("sharing") / "run"
    outcome = jemkit("train", *SHORT, "--quiet", "--out", str(out))
    assert outcome.code == 0, outcome.err
    return out


def together(cwd: Path, *arguments: str, **options: Any) -> Outcome:
    """Two processes of torchrun; their output without torchrun's own reports."""
    done = torchrun(*arguments, cwd=cwd, **options)
    return Outcome(done.returncode, done.stdout, done.stderr)


def errors(outcome: Outcome) -> list[str]:
    return [line for line in outcome.err.splitlines() if line.startswith("error: ")]


def ends(outcome: Outcome) -> set[int]:
    """The exit codes that torchrun reports."""
    return {int(code) for code in re.findall(r"exitcode *: (-?\d+)", outcome.err)}


def figures(outcome: Outcome) -> dict[str, Any]:
    """All that a record tells but how long it took."""
    clock = ("seconds",)
    return {
        f["name"]: {
            **f, "protocol": {k: v for k, v in f["protocol"].items() if k not in clock}
        }
        for f in outcome.record["figures"]
    }  # fmt: skip


def test_processes_that_share_an_evaluation_find_what_one_finds(run: Path, tmp_path: Path) -> None:
    asked = (
        "evaluate",
        str(run),
        *PGD,
        "--only",
        "energies",
        "--batch-size",
        "60",
        "--json",
        "--out",
    )
    one = jemkit(*asked, str(tmp_path / "one"))
    two = together(tmp_path, *asked, "two")
    assert two.code == 0, two.err
    assert len(two.out.splitlines()) == 1  # one of them speaks
    assert figures(two) == figures(one)
    rows = [(tmp_path / name / "evaluation.safetensors").read_bytes() for name in ("one", "two")]
    assert rows[0] == rows[1]
    assert not (tmp_path / "two" / ".evaluation").exists()  # nothing half-done is left


def test_a_mistake_is_said_once_and_ends_all(run: Path, tmp_path: Path) -> None:
    ended = together(tmp_path, "evaluate", str(run), *PGD, "--eps-px", "0.031", "--out", "new")
    assert len(errors(ended)) == 1
    assert "probably a fraction" in errors(ended)[0]
    assert ended.code != 0
    assert 3 in ends(ended)
    assert ends(ended) <= {3, -signal.SIGTERM}  # torchrun may end one before it has ended itself
    assert not (tmp_path / "new").exists()


def pieces(out: str, n: int) -> Callable[[Path], bool]:
    """Whether so many pieces of the work are finished."""
    return lambda cwd: len(list((cwd / out).glob(".*/*/*.safetensors"))) >= n


def test_a_stop_ends_all_processes_and_the_same_command_goes_on(run: Path, tmp_path: Path) -> None:
    slow = ("--max-images", "160", "--set", "pgd.steps=600", "--batch-size", "20")
    asked = ("evaluate", str(run), *PGD, *slow, "--json", "--out")
    stopped = together(tmp_path, *asked, "a", kill=pieces("a", 3), by=signal.SIGTERM)
    assert stopped.code != 0
    assert ends(stopped) == {5}
    told = re.findall(r"(?m)^process \d of 2: stopped; .*$", stopped.err)
    assert told
    assert all("same command continues" in line for line in told)
    assert pieces("a", 3)(tmp_path)
    again, whole = (jemkit(*asked, str(tmp_path / out)) for out in "ab")
    assert figures(again) == figures(whole)


def images(outcome: Outcome, cwd: Path) -> Any:
    with np.load(cwd / outcome.record["npz"]) as found:
        return found["image"]


def test_processes_that_share_a_drawing_draw_what_one_draws(run: Path, tmp_path: Path) -> None:
    n = 2 * TOGETHER + 7
    asked = ("sample", str(run), "-n", str(n), "--steps", "2", "--class", "all", "--json", "--out")
    one, two = jemkit(*asked, str(tmp_path / "one")), together(tmp_path, *asked, "two")
    assert two.code == 0, two.err
    assert len(two.out.splitlines()) == 1
    assert two.record["protocol"] == one.record["protocol"]
    assert np.array_equal(images(one, tmp_path), images(two, tmp_path))
    parts = np.split(images(one, tmp_path)[: 2 * TOGETHER], 2)
    assert not np.array_equal(*parts)  # each batch of chains has a stream of its own
    assert not (tmp_path / "two" / ".drawing").exists()


def test_a_drawing_that_is_stopped_goes_on_from_its_finished_batches(
    run: Path, tmp_path: Path
) -> None:
    n = str(3 * TOGETHER)
    asked = ("sample", str(run), "-n", n, "--steps", "150", "--json", "--out")
    stopped = together(tmp_path, *asked, "a", kill=pieces("a", 1), by=signal.SIGTERM)
    assert ends(stopped) == {5}, stopped.err
    told = re.findall(r"(?m)^process \d of 2: stopped; .*$", stopped.err)
    assert told
    assert all("same command continues" in line for line in told)
    again, whole = jemkit(*asked, str(tmp_path / "a")), jemkit(*asked, str(tmp_path / "b"))
    assert np.array_equal(images(again, tmp_path), images(whole, tmp_path))


def prepared(folder: str) -> list[str]:
    """What each process gets of a preparation that fails in all, in one, and in none."""
    told: list[str] = []
    me = distributed.shard().rank

    def fails(ranks: tuple[int, ...]) -> str:
        if me in ranks:
            raise ConfigError("wrong")
        return "ready"

    for ranks in ((0, 1), (1,), ()):
        try:
            told.append(distributed.prepared(lambda ranks=ranks: fails(ranks)))
        except ConfigError as error:
            told.append(f"{error}, {error.reported}")
    (Path(folder) / str(me)).touch()
    distributed.barrier()
    return [*told, str(len(list(Path(folder).iterdir())))]


def test_an_error_of_rank_0_too_is_reported_by_rank_0_alone(tmp_path: Path) -> None:
    assert every_rank(prepared, str(tmp_path)) == [
        ["wrong, False", "ready", "ready", "2"], ["wrong, True", "wrong, False", "ready", "2"],
    ]  # fmt: skip
