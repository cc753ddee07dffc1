"""`jemkit train` as its user runs it: results, terminals, interrupts, resuming."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_tools import CLASSIFIER, KEYS, SHORT, TINY, Outcome, jemkit, one_line
from forked import Forked
from imagefolders import split_folder
from waiting import until


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class TestTrain:
    def test_the_last_line_is_one_object_with_the_promised_keys(
        self, trained: tuple[Path, Outcome]
    ) -> None:
        home, done = trained
        assert done.code == 0, done.err
        record = done.record
        assert list(record) == KEYS
        assert (record["backbone"], record["objective"]) == ("sadajem", "ebjdat")
        assert (record["dataset"], record["seed"], record["epochs"]) == ("digits", 0, 1)
        assert record["radius_px"] == 25.5
        assert 0 <= record["pgd_accuracy"] <= 1
        assert (home / record["run"] / "config.json").exists()
        assert record["run"].startswith("runs/sadajem-ebjdat-digits-2")
        assert "\x1b" not in done.out + done.err

    def test_latest_points_to_the_newest_run(self, trained: tuple[Path, Outcome]) -> None:
        home, done = trained
        assert (home / "runs" / "latest").resolve() == (home / done.record["run"]).resolve()

    def test_off_a_terminal_there_is_one_plain_line_an_epoch_and_a_table(self) -> None:
        done = jemkit("train", *CLASSIFIER, "--out=here")
        assert done.code == 0, done.err
        assert done.out.startswith("run here\n")
        assert done.out.splitlines()[1].startswith("epoch   1  step      4  validation accuracy")
        assert "Linf 25.5/255; 20 steps of 6.375/255" in done.out
        assert "Wilson" in done.out
        assert "\x1b" not in done.out

    def test_quiet_shows_the_results_alone(self) -> None:
        done = jemkit("train", *CLASSIFIER, "--out=here", "--quiet")
        assert done.out.startswith("epoch 1 of 1 (best")

    def test_a_folder_that_holds_something_is_refused(self) -> None:
        Path("here").mkdir()
        Path("here/thesis.tex").write_text("precious")
        done = jemkit("train", *SHORT, "--out=here")
        assert "here already exists" in one_line(done, 3)
        assert [p.name for p in Path("here").iterdir()] == ["thesis.tex"]

    def test_the_link_to_the_newest_run_is_no_place_for_a_run(self) -> None:
        assert "choose another --out" in one_line(jemkit("train", *SHORT, "--out=runs/latest"), 3)

    def test_a_dry_run_checks_everything_and_writes_nothing(self) -> None:
        done = jemkit("train", *SHORT, "--dry-run", "--json")
        assert done.code == 0, done.err
        plan = done.record
        assert plan["parameters"] > 0
        assert (plan["network"], plan["device"], plan["steps"]) == ("smallcnn", "cpu", 4)
        assert list(Path().iterdir()) == []
        misfit = jemkit("train", "--backbone=classifier", "--dry-run", "--network=smallcnn")
        assert "has no density" in one_line(misfit, 3)

    def test_a_preset_says_which_reading_it_takes(self) -> None:
        done = jemkit("train", "--preset=paper", *SHORT, "--dry-run")
        assert done.out.startswith("preset paper: EB-JDAT")
        assert "Table 3" in done.out.splitlines()[0]

    def test_weights_can_be_taken_from_a_run(self, trained: tuple[Path, Outcome]) -> None:
        home, done = trained
        source = home / done.record["run"] / "checkpoints" / "best"
        assert jemkit("train", *SHORT, f"--init-from={source}", "--dry-run").code == 0
        assert "is not a checkpoint" in one_line(jemkit("train", *SHORT, "--init-from=nowhere"), 6)
        assert not Path("runs").exists()

    def test_a_run_that_diverges_ends_with_four(self) -> None:
        done = jemkit("train", *SHORT, "--set=optimizer.lr=1e30", "--set=schedule.warmup=0")
        assert done.code == 4
        first, *rest = done.err.splitlines()
        assert first.startswith("error: diverged at step")
        assert all(line.startswith("  - ") for line in rest)
        assert "--init-from" not in done.err  # it diverged at once, from what it began with


class TestTerminal:
    def test_there_is_a_bar_and_an_interrupt_ends_inside_a_chain(self, tmp_path: Path) -> None:
        leader, follower = pty.openpty()
        arguments = ("train", *SHORT, "--set=backbone.steps=100000", "--out=here")
        terminal = dict.fromkeys(("stdout", "stderr"), os.ttyname(follower))
        running = Forked(
            *arguments, cwd=tmp_path, streams=terminal, TERM="xterm-256color", NO_COLOR="1"
        )
        shown = read_until(leader, "0/4")
        os.close(follower)
        running.send_signal(signal.SIGINT)
        shown = read_until(leader, "continue with --resume", shown)
        assert "once more ends at once" in shown
        assert running.wait() == 5
        assert "0/4" in shown
        assert "1/4" not in shown  # no step was waited for
        os.close(leader)
        assert "run here" in shown
        assert "epoch 1/1" in shown
        assert "Traceback" not in shown
        assert not re.search(r"\x1b\[[0-9;]*3[0-7][0-9;]*m", shown)  # NO_COLOR


def test_a_second_interrupt_ends_at_once() -> None:
    script = (
        "import time; from jemkit_cli.terminal import guarded, stopping\n"
        "@guarded\n"
        "def wait():\n"
        "    with stopping() as stop:\n"
        "        print('ready', flush=True)\n"
        "        while True: time.sleep(60)\n"
        "wait()"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stderr is not None
    assert running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGINT)
    while "once more ends at once" not in running.stderr.readline():
        pass
    running.send_signal(signal.SIGINT)
    assert "interrupted" in running.stderr.read()
    assert running.wait() != 0


def read_until(terminal: int, word: str, shown: str = "") -> str:
    """What a terminal has shown, up to and with a word."""
    while word not in shown:
        try:
            piece = os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # how Linux tells the end of a terminal
            piece = ""
        assert piece, f"ended without {word!r}: {shown}"
        shown += piece
    return shown


class TestResume:
    def test_a_stopped_run_is_saved_and_goes_on_to_its_end(self, tmp_path: Path) -> None:
        arguments = ("train", *TINY, "--epochs=6", "--set=objective.adv_steps=1", "--out=here")
        running = Forked(*arguments, cwd=tmp_path)
        until(lambda: "epoch   1" in running.text("stdout"), "the first epoch")
        running.send_signal(signal.SIGTERM)
        code, _, err = running.outcome()
        assert code == 5, err
        assert "continue with --resume --out here" in err
        assert "Traceback" not in err
        done = jemkit("train", "--resume", "--out=here", "--json")
        assert done.code == 0, done.err
        assert done.record["epochs"] == 6
        rows = Path("here/metrics.csv").read_text().splitlines()[1:]
        assert [int(row.split(",")[0]) for row in rows] == list(range(24))

    def test_without_a_folder_the_newest_run_goes_on(
        self, trained: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home, before = trained
        monkeypatch.chdir(home)
        done = jemkit("train", "--resume", "--json")
        assert done.code == 0, done.err
        assert done.record["clean_accuracy"] == before.record["clean_accuracy"]
        assert (home / "runs" / "latest" / "config.json").exists()

    def test_the_command_that_started_a_run_resumes_it_and_another_does_not(
        self, trained: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home, before = trained
        monkeypatch.chdir(home)
        done = jemkit("train", *SHORT, "--resume", "--json")
        assert done.code == 0, done.err
        assert done.record["clean_accuracy"] == before.record["clean_accuracy"]
        other = jemkit("train", *SHORT, "--resume", "--set=run.seed=7", "--precision=bf16")
        message = one_line(other, 2)
        assert "run.seed = 7: the run was started with 0" in message
        assert "run.precision = bf16: the run was started with fp32" in message
        assert "omit --dry-run" in one_line(jemkit("train", "--resume", "--dry-run"), 2)

    def test_a_run_finds_its_images_from_another_working_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        split_folder(tmp_path / "there" / "images", n=6)
        monkeypatch.chdir(tmp_path / "there")
        given = ("--dataset=folder", "--data-dir=images", "--objective=ce", "--network=smallcnn")
        few = ("--backbone=classifier", "--epochs=1", "--set=backbone.network.channels=1")
        done = jemkit("train", *given, *few, "--set=run.batch_size=4", "--out=run", "--json")
        assert done.code == 0, done.err
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        judged = jemkit("evaluate", "../there/run", "--only=accuracy", "--json")
        assert judged.code == 0, judged.err
        again = jemkit("train", "--resume", "--out=../there/run", "--json")
        assert again.record["clean_accuracy"] == done.record["clean_accuracy"]
        other = jemkit("evaluate", "../there/run", "--only=accuracy", "--data-dir=images")
        assert str(tmp_path / "elsewhere" / "images") in one_line(other, 6)

    def test_a_folder_that_is_no_run_cannot_be_resumed(self) -> None:
        assert "no config.json" in one_line(jemkit("train", "--resume"), 6)


def test_a_run_that_torchrun_may_restart_needs_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    done = jemkit("train", "--epochs=1", "--dry-run")
    assert "continues the run in --out: name the folder" in one_line(done, 2)
