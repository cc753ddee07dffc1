"""A run that cannot fit is refused, one that finds its disk full waits for room."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import toy_recipe, toy_registry

from jemkit import ConfigError, DataError, Preempted, Trainer, train
from jemkit.runtime import checkpoint, disk
from jemkit.runtime.lock import LOCK, locked
from jemkit.runtime.run_dir import RunFolder
from jemkit.training.run import still_needed

REGISTRY = toy_registry()


def full(path: str = "x") -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", path)


def failing(times: int) -> Callable[[], str]:
    left = [full() for _ in range(times)]

    def write() -> str:
        if left:
            raise left.pop()
        return "written"

    return write


def test_a_write_waits_until_there_is_room_and_says_so_once() -> None:
    messages: list[str] = []
    slept: list[float] = []
    patience = disk.Patience(lambda: False, messages.append, slept.append)
    with disk.waiting(patience):
        assert disk.until_room(Path("a/b"), failing(3)) == "written"
    assert slept == [patience.every] * 3
    assert len(messages) == 2
    assert "full: waiting" in messages[0]
    assert "there is free space again: b is written" in messages[1]


def test_a_stop_ends_the_wait_and_says_what_is_saved_and_what_to_do() -> None:
    stops = iter([False, False, True])
    messages: list[str] = []
    patience = disk.Patience(lambda: next(stops), messages.append, lambda _: None)
    with disk.waiting(patience), pytest.raises(DataError, match=r"is not written.*--resume"):
        disk.until_room(Path("a/b"), failing(9))
    assert len(messages) == 1


def test_outside_of_a_run_and_for_any_other_mistake_nothing_waits() -> None:
    with pytest.raises(OSError, match="No space left"):
        disk.until_room(Path("a"), failing(1))

    def refused() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "a")

    patience = disk.Patience(lambda: False, print, lambda _: pytest.fail("slept"))
    with disk.waiting(patience), pytest.raises(PermissionError):
        disk.until_room(Path("a"), refused)


def test_a_run_is_refused_where_it_cannot_fit_and_warned_where_it_is_tight(tmp_path: Path) -> None:
    assert disk.check_room(tmp_path, 79, free=lambda _: 100) is None
    assert "79.0 MB of the 80.0 MB" in str(
        disk.check_room(tmp_path, 79_000_000, free=lambda _: 80_000_000)
    )
    with pytest.raises(DataError, match=r"needs 1\.2 GB but its disk has 80\.0 MB free"):
        disk.check_room(tmp_path, 1_200_000_000, free=lambda _: 80_000_000)
    assert disk.free_bytes(tmp_path / "not" / "there") == disk.free_bytes(tmp_path)


def test_a_run_without_room_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="free some space"):
        train(toy_recipe(REGISTRY), tmp_path / "run", registry=REGISTRY, free=lambda _: 1000)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_forecast_covers_what_a_run_takes(tmp_path: Path, optimizer: str) -> None:
    recipe = toy_recipe(REGISTRY, "jem", "ebjdat", "sam", f"optimizer.use={optimizer}")
    trainer = Trainer(recipe, RunFolder(tmp_path / "run"))
    needed = still_needed(trainer, trainer.state_dict())
    train(recipe, tmp_path / "run", registry=REGISTRY)
    taken = disk.used_bytes(tmp_path / "run")
    assert taken < needed
    one = disk.used_bytes(tmp_path / "run" / "checkpoints" / "best")
    small = disk.state_bytes(trainer.state_dict()) + disk.momenta_bytes(trainer.optimizer)
    assert 0.5 * one < small < 2 * one


@given(shape=st.lists(st.integers(0, 9), max_size=3))
def test_a_states_bytes_are_those_of_its_tensors_and_little_more(shape: list[int]) -> None:
    x = torch.zeros(shape, dtype=torch.float64)
    assert 8 * x.numel() <= disk.state_bytes({"a": [x], "b": 1}) <= 8 * x.numel() + 4 * disk.LEAF


FULL_AMID_A_LINE = """
import resource, signal, sys
from pathlib import Path
from jemkit.runtime.files import append_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write past the limit is an OSError
resource.setrlimit(resource.RLIMIT_FSIZE, (102, resource.RLIM_INFINITY))
try:
    append_text(Path(sys.argv[1]), "x" * 300 + chr(10))
except OSError as error:
    print(error.filename)
"""


def test_a_disk_that_is_full_amid_a_line_keeps_none_of_it_and_the_error_names_the_file(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    log.write_text("one\n")
    done = subprocess.run(
        [sys.executable, "-c", FULL_AMID_A_LINE, str(log)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(log)
    assert log.read_text() == "one\n"


def test_a_run_in_a_folder_that_another_trains_in_is_refused(tmp_path: Path) -> None:
    out, kinds = tmp_path / "run", []

    def watch(kind: str, _: dict[str, object]) -> None:
        if kind == "start":
            with pytest.raises(ConfigError, match=r"in use: process \d+ on .* has trained in"):
                train(toy_recipe(REGISTRY), out, registry=REGISTRY, resume=True)
            with pytest.raises(ConfigError, match="already exists"):
                train(toy_recipe(REGISTRY), out, registry=REGISTRY)
            kinds.append(kind)

    train(toy_recipe(REGISTRY), out, registry=REGISTRY, watch=watch)
    assert kinds == ["start"]


def test_what_a_kill_left_of_a_run_that_had_not_begun_is_begun_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoints" / ".step-00000000.abc").mkdir(parents=True)
    (out / "checkpoints" / "step-00000000").mkdir()
    (out / ".config.json.abc").touch()
    with pytest.raises(ConfigError, match="already exists"):  # whose folder it is nobody knows
        train(toy_recipe(REGISTRY), out, registry=REGISTRY)
    with locked(out / LOCK, "tries"), pytest.raises(ConfigError, match="in use"):
        train(toy_recipe(REGISTRY), out, registry=REGISTRY)
    train(toy_recipe(REGISTRY), out, registry=REGISTRY)
    assert not list(out.glob(".config*"))
    (out / "config.json").unlink()
    with pytest.raises(ConfigError, match="already exists"):  # its checkpoints are a run's
        train(toy_recipe(REGISTRY), out, registry=REGISTRY)


def stopped_at_8(out: Path) -> None:
    stops = iter([False] * 8 + [True])
    with pytest.raises(Preempted):
        train(toy_recipe(REGISTRY), out, registry=REGISTRY, stop=lambda: next(stops))


@pytest.mark.parametrize("which", [["step-00000008"], ["step-00000008", "best"], ["best"]])
def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_before_it(
    tmp_path: Path, which: list[str]
) -> None:
    out = tmp_path / "run"
    stopped_at_8(out)
    for name in which:
        path = out / "checkpoints" / name / checkpoint.MODEL
        path.unlink()  # best may be a second name of the same file
        path.write_bytes(b"damaged")
    train(toy_recipe(REGISTRY), out, registry=REGISTRY, resume=True)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    messages = [e["message"] for e in events if e["event"] == "damaged"]
    assert len(messages) >= 1
    assert any(which[0] in message for message in messages)
    for name in which:
        assert (out / "checkpoints" / f"damaged-{name}" / checkpoint.MODEL).exists()
    assert [int(row["step"]) for row in RunFolder(out).metrics()] == list(range(12))
    checkpoint.load(out / "checkpoints" / "best")
    checkpoint.load(out / "checkpoints" / "step-00000012")
