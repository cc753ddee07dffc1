"""One evaluation, or one drawing, by several processes: what one process alone finds."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import Outcome, jemkit, short_run
from forked import commands
from ranks import every_rank, torchrun
from terminated import sigterm_after_a_piece
from toys import linear_model

from jemkit import ConfigError, Images, MisfitError, PixelModel
from jemkit.evaluation.subjects import EvalTarget
from jemkit.runtime import distributed
from jemkit.sampling.fresh import TOGETHER
from jemkit_cli import evaluate as evaluate_command

PGD = ("--attack", "pgd", "--only", "robustness", "--set", "robustness.indicators=false")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on digits."""
    return short_run(tmp_path_factory.mktemp("sharing"))


def errors(outcomes: list[Outcome]) -> list[str]:
    lines = [line for outcome in outcomes for line in outcome.err.splitlines()]
    return [line for line in lines if line.startswith("error: ")]


def ends(outcomes: list[Outcome]) -> set[int]:
    return {outcome.code for outcome in outcomes}


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
    """Started by torchrun."""
    evaluate = (
        "evaluate", str(run), *PGD, "--only", "energies", "--batch-size", "20", "--max-images",
        "60", "--set", "pgd.steps=5", "--json", "--out",
    )  # fmt: skip
    one = jemkit(*evaluate, str(tmp_path / "one"))
    two = torchrun(*evaluate, "two", cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert len(two.stdout.splitlines()) == 1  # the first process alone prints
    assert figures(Outcome(0, two.stdout, two.stderr)) == figures(one)
    rows = [(tmp_path / name / "evaluation.safetensors").read_bytes() for name in ("one", "two")]
    assert rows[0] == rows[1]
    assert not (tmp_path / "two" / ".evaluation").exists()  # no unfinished work is left


def test_a_mistake_is_reported_once_and_ends_all(run: Path, tmp_path: Path) -> None:
    wrong = ("evaluate", str(run), *PGD, "--eps-px", "0.031", "--out", "new")
    outcomes = commands(*wrong, cwd=tmp_path)
    assert len(errors(outcomes)) == 1
    assert "probably a fraction" in errors(outcomes)[0]
    assert ends(outcomes) == {3}
    assert not (tmp_path / "new").exists()


def require_stopped(outcomes: list[Outcome]) -> None:
    """Every process ended as preempted, said so, and left what it had finished."""
    assert ends(outcomes) == {5}
    for outcome, prefix in zip(outcomes, ("", "process 1 of 2: "), strict=True):
        (message,) = re.findall(rf"(?m)^{prefix}stopped; .*$", outcome.err)
        assert "same command continues" in message


def test_a_stop_ends_all_processes_and_the_same_command_goes_on(run: Path, tmp_path: Path) -> None:
    small = ("--max-images", "80", "--set", "pgd.steps=5", "--batch-size", "20")
    evaluate = ("evaluate", str(run), *PGD, *small, "--json", "--out")
    require_stopped(commands(*evaluate, "a", cwd=tmp_path, before=sigterm_after_a_piece))
    assert len(list((tmp_path / "a").glob(".*/*/*.safetensors"))) == 2
    again, whole = (jemkit(*evaluate, str(tmp_path / out)) for out in "ab")
    assert figures(again) == figures(whole)


def images(outcome: Outcome, cwd: Path) -> Any:
    with np.load(cwd / outcome.record["npz"]) as saved:
        return saved["image"]


def test_processes_that_share_a_drawing_draw_what_one_draws(run: Path, tmp_path: Path) -> None:
    n = str(2 * TOGETHER + 7)
    sample = ("sample", str(run), "-n", n, "--steps", "2", "--class", "all", "--json", "--out")
    one, two = jemkit(*sample, str(tmp_path / "one")), commands(*sample, "two", cwd=tmp_path)
    assert ends(two) == {0}, two
    assert two[1].out == ""
    assert two[0].record["protocol"] == one.record["protocol"]
    assert np.array_equal(images(one, tmp_path), images(two[0], tmp_path))
    parts = np.split(images(one, tmp_path)[: 2 * TOGETHER], 2)
    assert not np.array_equal(*parts)  # each batch of chains has a stream of its own
    assert not (tmp_path / "two" / ".drawing").exists()


def test_a_drawing_that_is_stopped_goes_on_from_its_finished_batches(
    run: Path, tmp_path: Path
) -> None:
    sample = ("sample", str(run), "-n", str(3 * TOGETHER), "--steps", "2", "--json", "--out")
    require_stopped(commands(*sample, "a", cwd=tmp_path, before=sigterm_after_a_piece))
    again, whole = jemkit(*sample, str(tmp_path / "a")), jemkit(*sample, str(tmp_path / "b"))
    assert np.array_equal(images(again, tmp_path), images(whole, tmp_path))


def prepared(folder: str) -> list[str]:
    """What each process gets of a preparation that fails in all, in one, and in none."""
    received: list[str] = []
    me = distributed.shard().rank

    def fails(ranks: tuple[int, ...]) -> str:
        if me in ranks:
            raise ConfigError("wrong")
        return "ready"

    for ranks in ((0, 1), (1,), ()):
        try:
            received.append(distributed.prepared(lambda ranks=ranks: fails(ranks)))
        except ConfigError as error:
            received.append(f"{error}, {error.reported}")
    (Path(folder) / str(me)).touch()
    distributed.barrier()
    return [*received, str(len(list(Path(folder).iterdir())))]


def test_an_error_of_rank_0_too_is_reported_by_rank_0_alone(tmp_path: Path) -> None:
    assert every_rank(prepared, str(tmp_path)) == [
        ["wrong, False", "ready", "ready", "2"], ["wrong, True", "wrong, False", "ready", "2"],
    ]  # fmt: skip


def agreed(hashed: bool, same_weights: bool) -> list[str]:
    """What processes with models of different hashes agree on."""
    rank = distributed.shard().rank
    about = {"sha256": f"{rank}" * 64} | ({} if hashed else {"identity": "it cannot be hashed"})
    model = PixelModel(linear_model(4, 2, 0 if same_weights else rank))
    images = Images(torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.long))
    try:
        target = EvalTarget(model, images, 2, 8.0, None, about, None)
        return [evaluate_command._agreed(target).about["sha256"]]
    except MisfitError as error:
        return [str(error)[:62], str(error.reported)]


def test_processes_with_different_models_do_not_share_an_evaluation() -> None:
    refused = "1 of the processes built another model than the first: its code"
    for hashed, same_weights in ((True, True), (False, False)):
        first, second = every_rank(agreed, hashed, same_weights)
        assert (first, second) == ([refused[:62], "False"], [refused[:62], "True"])
    assert every_rank(agreed, False, True) == [["0" * 64]] * 2
