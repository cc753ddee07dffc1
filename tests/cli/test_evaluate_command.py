"""`jemkit evaluate` as its user runs it."""

import io
import json
import os
import resource
import shutil
from functools import partial
from pathlib import Path

import pytest
from cli_tools import jemkit, short_run
from forked import forked
from terminated import sigterm_after_a_piece

from jemkit.metrics import record as records
from jemkit_cli import progress

QUIET = ("--set", "robustness.indicators=false")
PGD = ("--attack", "pgd", "--only", "robustness", *QUIET)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on digits."""
    return short_run(tmp_path_factory.mktemp("evaluate"))


def judged(run: Path, out: Path, *options: str) -> dict[str, dict[str, object]]:
    outcome = jemkit("evaluate", str(run), *PGD, "--out", str(out), "--json", *options)
    assert outcome.code == 0, outcome.err
    return {figure["name"]: figure for figure in outcome.record["figures"]}


def test_the_record_of_a_run_is_what_json_prints(run: Path, tmp_path: Path) -> None:
    outcome = jemkit("evaluate", str(run), *PGD, "--out", str(tmp_path), "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "evaluation.json").read_text()) == outcome.record
    names = [figure["name"] for figure in outcome.record["figures"]]
    assert names == ["clean", "pgd20"]
    assert outcome.record["subject"]["backbone"] == "sadajem"


def test_training_and_evaluation_agree_on_clean_and_pgd20(run: Path, tmp_path: Path) -> None:
    lines = (run / "events.jsonl").read_text().splitlines()
    end = next(json.loads(line) for line in lines if json.loads(line)["event"] == "end")
    trained = {figure["name"]: figure["value"] for figure in end["figures"]}
    figures = judged(run, tmp_path)
    for name in ("clean", "pgd20"):
        assert figures[name]["value"] == trained[name]


def test_what_training_measured_is_the_beginning_of_the_record(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    begun = records.load(copy)
    names = [
        "clean",
        "pgd20",
        "gap_mean",
        "gap_variance",
        "gap_signed",
        "gap_joint",
        "gap_relative",
    ]
    assert [figure.name for figure in begun.figures] == names
    for figure in begun.figures:
        assert figure.protocol["standard"]
        assert figure.protocol["checkpoint"] == begun.subject["sha256"]
        assert {
            "selection",
            "seed",
            "radius_px",
            "image_px",
            "test_sha256",
        } <= figure.protocol.keys()
    assert begun.rows_of(begun.figure("pgd20")) is not None
    seed = ("--seed", str(begun.protocol["seed"]))
    outcome = jemkit("evaluate", str(copy), *PGD, *seed)
    assert outcome.code == 0, outcome.err
    again = records.load(copy)
    assert sorted(figure.name for figure in again.figures) == sorted(names)
    assert again.value("pgd20") == begun.value("pgd20")
    outcome = jemkit("evaluate", str(copy), *PGD, "--seed", "7")
    assert outcome.code == 0, outcome.err
    assert len(records.load(copy).figures) == len(names) + 2


def test_compare_takes_the_two_newest_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / "runs" / name, symlinks=True)
    outcome = jemkit("compare", "--json")
    assert outcome.code == 0, outcome.err
    assert sorted(outcome.record["runs"]) == ["a", "b"]
    outcome = jemkit("report", "runs/nothere")
    assert (outcome.code, "runs/nothere does not exist" in outcome.err) == (6, True)


def test_a_wider_radius_and_another_norm_are_in_the_card(run: Path, tmp_path: Path) -> None:
    wide = judged(run, tmp_path, "--eps-px", "100")["pgd20"]
    narrow = judged(run, tmp_path, "--eps-px", "1")["pgd20"]
    assert wide["value"] <= narrow["value"]
    assert wide["protocol"]["radius_px"] == 100
    assert wide["protocol"]["trained_radius_px"] == 25.5
    two = judged(run, tmp_path, "--norm", "L2", "--eps-px", "127.5")["pgd20"]
    assert two["protocol"]["norm"] == "L2"
    assert 120 < two["protocol"]["max_delta_px"]["L2"] <= 127.5 * (1 + 1e-4)


def test_the_table_of_a_quick_evaluation_begins_with_what_was_shortened(
    run: Path, tmp_path: Path
) -> None:
    quick = ("--quick", "--max-images", "20", "--only", "accuracy")
    outcome = jemkit("evaluate", str(run), *quick, "--out", str(tmp_path))
    assert outcome.code == 0, outcome.err
    first = outcome.out.splitlines()[0]
    assert first.startswith("not the standard protocol: --quick: PGD alone without --attack")
    assert first.endswith("; test images: 20 of 500, stratified by class, seed 0")


def test_the_table_shows_clean_first_and_every_protocol(run: Path, tmp_path: Path) -> None:
    outcome = jemkit("evaluate", str(run), *PGD, "--out", str(tmp_path), "--max-images", "40")
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if "accuracy" in line]
    assert lines[0].strip().startswith("clean accuracy")
    assert "25.5/255" in outcome.out
    assert "NON-STANDARD" in outcome.out
    first = outcome.out.splitlines()[0]
    subset = "test images: 40 of 500, stratified by class, seed 0"
    assert first == f"not the standard protocol: {subset}"
    assert "weights " in outcome.out


@pytest.mark.parametrize(("options", "code", "message"), [
    (("--eps-px", "0.031"), 3, "probably a fraction: write 8"),
    (("--eps-px", "300"), 3, "wider than the whole range"),
    (("--attack", "pgb"), 3, "did you mean 'pgd'"),
    (("--only", "accurracy"), 3, "did you mean 'accuracy'"),
    (("--set", "pgd.stepz=3"), 3, "did you mean 'steps'"),
    (("--norm", "L7"), 2, "'L7' is not one of 'Linf', 'L2', 'L1'"),
    (("--checkpoint", "worst"), 2, "worst"),
])  # fmt: skip
def test_a_mistake_is_one_message_and_a_code(
    run: Path, tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    outcome = jemkit("evaluate", str(run), *options, "--out", str(tmp_path / "new"))
    assert outcome.code == code
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert "Value error" not in outcome.err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_no_run_and_a_run_without_checkpoint_have_other_messages(
    run: Path, tmp_path: Path
) -> None:
    nothing = jemkit("evaluate", str(tmp_path))
    assert (nothing.code, "not a run of jemkit" in nothing.err) == (6, True)
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    bare = jemkit("evaluate", str(tmp_path))
    assert (bare.code, "no complete best checkpoint" in bare.err) == (6, True)


def test_a_bar_is_drawn_from_the_first_word_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    screen = io.StringIO()
    wide = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "console", lambda: wide)
    with progress.tracking(silent=False) as track:
        for done in (1, 2, 10):
            track("apgd-ce", done, 10)
        track("square", 0, 3)
    assert "apgd-ce" in screen.getvalue()


def test_without_a_terminal_a_line_now_and_then_tells_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 1.0, 2.0, 41.0, 81.0, 82.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.tracking(silent=False) as track:
        for done in (0, 0, 0, 4, 5):
            track("apgd-ce", done, 10)
    lines = "apgd-ce: 0 of 10, 40 s so far\napgd-ce: 4 of 10, 120 s left\n"
    assert capsys.readouterr() == ("", lines)


def test_a_termination_ends_soon_with_its_own_code_and_loses_nothing(
    run: Path, tmp_path: Path
) -> None:
    small = ("--set", "pgd.steps=5", "--batch-size", "20", "--max-images", "160")
    arguments = ("evaluate", str(run), *PGD, *small, "--out", str(tmp_path / "a"))
    code, _, err = forked(*arguments, cwd=tmp_path, before=sigterm_after_a_piece)
    assert code == 5, err
    assert "same command continues" in err
    assert 1 <= len(list((tmp_path / "a" / ".evaluation").glob("*/*.safetensors"))) < 8
    again = jemkit(*arguments, "--json")
    assert again.code == 0, again.err
    whole = judged(run, tmp_path / "b", *small)
    values = {figure["name"]: figure["value"] for figure in again.record["figures"]}
    assert values["pgd5"] == whole["pgd5"]["value"]


def test_a_full_disk_keeps_the_record_that_was_there(run: Path, tmp_path: Path) -> None:
    judged(run, tmp_path, "--max-images", "30")
    before = (tmp_path / "evaluation.json").read_bytes()
    done = forked(
        "evaluate", str(run), "--only", "accuracy", "--out", str(tmp_path), cwd=tmp_path,
        before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2000, 2000)),
    )  # fmt: skip
    assert done.code == 6, done.err
    assert "free some space" in done.err
    assert "Traceback" not in done.err
    assert (tmp_path / "evaluation.json").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".evaluation.json")]
