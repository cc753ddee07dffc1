"""The command does what README says: it trains, samples, lists, shows, and refuses in one line."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import KEYS, SHORT, TINY, Outcome, command, environment, jemkit, process
from imagefolders import split_folder
from PIL import Image

from jemkit import installed, resolve
from jemkit.config.recipe import complete

CLASSIFIER = (
    "--backbone=classifier",
    "--objective=ce",
    "--network=smallcnn",
    "--set=run.max_train=80",
    "--set=run.batch_size=16",
    "--epochs=1",
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """One tiny run by the command in a process of its own, as a user starts it."""
    home = tmp_path_factory.mktemp("home")
    return home, process("train", *SHORT, "--json", cwd=home)


def one_line(done: Outcome, code: int) -> str:
    """The only line of an error."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    return done.err


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
        running = subprocess.Popen(
            command(*arguments),
            cwd=tmp_path,
            env=environment(TERM="xterm-256color", NO_COLOR="1"),
            stdout=follower,
            stderr=follower,
        )
        os.close(follower)
        shown = until(leader, "0/4")
        running.send_signal(signal.SIGINT)
        shown += until(leader, "once more ends at once")
        shown += until(leader, "continue with --resume")
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


def until(terminal: int, word: str) -> str:
    """What a terminal shows up to and with a word."""
    shown = ""
    while word not in shown:
        try:
            piece = os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # how Linux tells the end of a terminal
            piece = ""
        assert piece, f"ended without {word!r}: {shown}"
        shown += piece
    return shown


class TestRefusals:
    def test_a_word_that_is_no_option_ends_with_two(self) -> None:
        for arguments in (["--backbon=x"], ["--epochs=many"], ["--device=tpu"]):
            done = jemkit("train", *arguments)
            assert done.code == 2
            assert "Traceback" not in done.err

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ("--backbone=sadajm", "did you mean 'sadajem'?"),
            ("--network=wnr-16-2", "(did you mean 'wrn-16-2'?). There are: mlp-HIDDEN-LAYERS"),
            ("--network=wrnn-10-1", "(did you mean 'wrn-10-1'?)"),
            ("--network=wrn-10-1x", "the pattern is wrn-DEPTH-WIDTH, such as wrn-28-10"),
            ("--backbone=jem-pp", "(did you mean 'jempp'?)"),
            ("--network=wrn-16", "the pattern is wrn-DEPTH-WIDTH"),
            ("--set=backbone.stps=5", "backbone.stps: no such option (did you mean 'steps'?)"),
            ("--set=backbon.steps=5", "unknown table [backbon] (did you mean 'backbone'?)"),
            ("--set=run.epochs=x", "run.epochs: Input should be a valid integer"),
            ("--set=epochs", "expected KEY=VALUE"),
            ("--epochs=0", "run.epochs: Input should be greater than or equal to 1; got 0"),
            ("--data-dir=x", "data.dir: no such option"),
            ("--preset=papper", "did you mean 'paper'?"),
        ],
    )
    def test_a_mistake_in_the_recipe_ends_with_three(self, argument: str, message: str) -> None:
        assert message in one_line(jemkit("train", argument), 3)
        assert list(Path().iterdir()) == []

    @pytest.mark.skipif(torch.cuda.is_available(), reason="here is one")
    def test_a_device_that_is_not_there_ends_with_three(self) -> None:
        assert "finds no CUDA device" in one_line(jemkit("train", "--device=cuda"), 3)

    def test_data_that_is_missing_ends_with_six_and_names_the_file(self) -> None:
        done = jemkit("train", "--dataset=cifar10", "--data-dir=nowhere")
        assert "nowhere/cifar-10-batches-py" in one_line(done, 6)
        assert "--download" in done.err

    @pytest.mark.parametrize("path", ["nowhere", "empty", "words.txt"])
    @pytest.mark.parametrize(
        "command",
        [
            ("evaluate",), ("sample",), ("export",), ("report",), ("compare",), ("verify-resume",),
            ("import", "--format=jem"), ("train", "--config"), ("train", "--init-from"),
            ("train", "--resume", "--out"), ("config", "show", "--config"),
        ],
        ids=" ".join,
    )  # fmt: skip
    def test_a_path_with_nothing_fit_ends_with_six(
        self, command: tuple[str, ...], path: str
    ) -> None:
        Path("empty").mkdir()
        Path("words.txt").write_text("run = [")
        assert path in one_line(jemkit(*command, path), 6)
        assert sorted(p.name for p in Path().iterdir()) == ["empty", "words.txt"]

    def test_every_mistake_is_told_at_once(self) -> None:
        done = jemkit("train", "--set=backbone.stps=5", "--set=run.seed=-1")
        assert (done.code, done.err.count("\n")) == (3, 2)


class TestResume:
    def test_a_stopped_run_is_saved_and_goes_on_to_its_end(self, tmp_path: Path) -> None:
        arguments = ("train", *TINY, "--epochs=6", "--set=objective.adv_steps=1", "--out=here")
        running = subprocess.Popen(
            command(*arguments),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert running.stdout is not None
        while not running.stdout.readline().startswith("epoch   1"):
            assert running.poll() is None
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate()
        assert running.returncode == 5, err
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
        told = one_line(other, 2)
        assert "run.seed = 7: the run was started with 0" in told
        assert "run.precision = bf16: the run was started with fp32" in told
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


class TestSample:
    def test_fresh_chains_give_a_grid_and_an_array_with_its_protocol(
        self, trained: tuple[Path, Outcome]
    ) -> None:
        home, done = trained
        arguments = ("sample", str(home / "runs" / "latest"), "--n=12", "--steps=2", "--json")
        drawn = jemkit(*arguments, "--class=3", "--class=1", "--start=uniform", "--out=here")
        assert drawn.code == 0, drawn.err
        record = drawn.record
        with np.load(record["npz"], allow_pickle=False) as found:
            assert found["image"].shape == (12, 8, 8, 1)
            assert found["image"].dtype == np.uint8
            assert found["label"].tolist() == [3] * 6 + [1] * 6
            protocol = json.loads(str(found["protocol"]))
        assert protocol == record["protocol"]
        assert (protocol["start"], protocol["steps"], protocol["class"]) == ("uniform", 2, [1, 3])
        assert protocol["sampler"]["use"] == "sgld"
        assert protocol["sha256"] in (home / done.record["run"] / "events.jsonl").read_text()
        Image.open(record["png"]).verify()

    def test_one_seed_gives_the_same_images(self, trained: tuple[Path, Outcome]) -> None:
        home, _ = trained
        run = str(home / "runs" / "latest")
        images = []
        for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
            arguments = ("--n=3", "--steps=2", f"--seed={seed}", f"--out={folder}", "--json")
            with np.load(jemkit("sample", run, *arguments).record["npz"]) as found:
                images.append(found["image"])
        assert (images[0] == images[1]).all()
        assert (images[0] != images[2]).any()

    def test_the_buffer_gives_its_states(self, trained: tuple[Path, Outcome]) -> None:
        home, _ = trained
        run = str(home / "runs" / "latest")
        done = jemkit("sample", run, "--from=buffer", "--n=20", "--out=here")
        assert done.code == 0, done.err
        assert "start: buffer" in done.out
        more = jemkit("sample", run, "--from=buffer", "--n=21")
        assert "21 states from a buffer that has 20" in one_line(more, 2)
        given = jemkit("sample", run, "--from=buffer", "--steps=3")
        assert "apply to new chains only" in one_line(given, 3)
        labelled = jemkit("sample", run, "--from=buffer", "--n=2", "--class=1")
        assert "class-conditional" in one_line(labelled, 3)

    def test_what_cannot_be_sampled_is_refused(self, trained: tuple[Path, Outcome]) -> None:
        run = str(trained[0] / "runs" / "latest")
        assert "'10': expected a number of 0..9" in one_line(jemkit("sample", run, "--class=10"), 3)
        assert "'x': expected a number" in one_line(jemkit("sample", run, "--class=x"), 3)
        for label in ("\u00b2", "9" * 5000):  # a digit that is no number, a number without end
            done = jemkit("sample", run, f"--class={label}")
            assert "expected a number" in one_line(done, 3)
        assert "0 images: expected 1 or more" in one_line(jemkit("sample", run, "--n=0"), 2)
        assert "-1 steps: expected 0 or more" in one_line(jemkit("sample", run, "--steps=-1"), 2)
        unknown = jemkit("sample", run, "--start=unifrm")
        assert "did you mean 'uniform'?" in one_line(unknown, 3)
        assert jemkit("train", *CLASSIFIER, "--out=plain", "--json").code == 0
        assert "without a density" in one_line(jemkit("sample", "plain"), 3)


class TestParts:
    def test_every_part_is_one_object(self) -> None:
        done = jemkit("plugins", "list", "--json", "--no-plugins")
        rows = json.loads(done.out)
        keys = ["kind", "name", "distribution", "version", "state", "fault"]
        assert all(list(row) == keys for row in rows)
        assert {row["state"] for row in rows} == {"ok"}
        assert {"kind": "backbone", "name": "sadajem"}.items() <= rows[
            [row["name"] for row in rows].index("sadajem")
        ].items()
        assert "sadajem" in jemkit("plugins", "list").out

    def test_a_part_tells_its_options_and_their_defaults(self) -> None:
        (found,) = json.loads(jemkit("plugins", "info", "sadajem", "--json").out)
        options = {option["name"]: option["default"] for option in found["options"]}
        assert options["steps"] == 10
        assert options["sampler"]["use"] == "sgld"
        assert "CVPR" in found["doc"] or "WideResNet" in found["doc"]
        text = jemkit("plugins", "info", "jem").out
        assert "backbone jem" in text
        assert "objective jem" in text
        assert "did you mean 'wrn'?" in one_line(jemkit("plugins", "info", "wnr"), 3)


class TestConfig:
    def test_what_is_shown_can_be_fed_back(self) -> None:
        arguments = ("--backbone=jem", "--objective=jem", "--epochs=3", "--network=wrn-16-2")
        wanted = complete(
            resolve(
                installed(),
                named={
                    "backbone": {"use": "jem", "network": {"use": "wrn-16-2"}},
                    "objective": {"use": "jem"},
                    "run": {"epochs": 3},
                },
            ),
            installed(),
        ).tables
        text = jemkit("config", "show", *arguments)
        whole = jemkit("config", "show", *arguments, "--json")
        assert json.loads(whole.out)["recipe"] == wanted
        assert tomllib.loads(text.out)["run"]["epochs"] == 3
        for name, content in (("a.toml", text.out), ("a.json", whole.out)):
            Path(name).write_text(content)
            again = jemkit("config", "show", f"--config={name}", "--json")
            assert json.loads(again.out)["recipe"] == wanted

    def test_every_value_is_shown_with_its_origin(self) -> None:
        done = jemkit("config", "show", "--epochs=3", "--set=run.seed=4", "--json")
        found = json.loads(done.out)
        assert found["origins"]["run.epochs"] == "option"
        assert found["origins"]["run.seed"] == "--set run.seed=4"
        assert found["origins"]["run.ema_decay"] == "default"

    def test_the_schema_is_json_and_knows_every_part(self) -> None:
        found = json.loads(jemkit("config", "schema").out)
        assert set(found["recipe"]["properties"]) >= {"run", "data", "backbone", "objective"}
        network = found["parts"]["backbone"]["jem"]["properties"]["network"]
        assert network["default"]["use"] == "wrn"


class TestHelp:
    def test_help_comes_fast_and_imports_neither_torch_nor_the_core(self, tmp_path: Path) -> None:
        code = (
            "import sys\n"
            "from jemkit_cli.app import main\n"
            "for words in (['--help'], ['train', '--help'], ['sample', '--help'], ['--version']):\n"
            "    try:\n        main(words)\n    except SystemExit as ended:\n"
            "        assert not ended.code\n"
            "print(len(sys.modules))\n"
            "print(sorted({'torch', 'jemkit', 'numpy'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        count, slow = done.stdout.splitlines()[-2:]
        assert slow == "[]"
        assert int(count) < 600  # half a second's worth; torch alone is another thousand

    def test_a_dry_run_imports_nothing_that_only_a_step_or_a_report_needs(
        self, tmp_path: Path
    ) -> None:
        code = (
            "import sys\n"
            "from jemkit_cli.app import main\n"
            "try:\n    main(sys.argv[1:])\nexcept SystemExit as ended:\n"
            "    assert not ended.code\n"
            "print(*sys.modules)"
        )
        words = ["train", "--backbone=sadajem", "--objective=ebjdat", "--dataset=digits"]
        words += ["--dry-run", "--no-plugins"]
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True, text=True, check=True, cwd=tmp_path,
        )  # fmt: skip
        loaded = set(done.stdout.splitlines()[-1].split())
        assert "jemkit.training.plan" in loaded
        assert not loaded & {
            "torch._dynamo", "torch._inductor", "torch.utils.tensorboard", "sympy", "sklearn",
            "scipy", "matplotlib", "torchvision", "timm", "lpips", "tensorboard", "pyautoattack",
            "torch_fidelity", "huggingface_hub",
        }  # fmt: skip

    def test_no_command_shows_the_help(self) -> None:
        done = jemkit()
        assert "train" in done.out + done.err
        assert "Traceback" not in done.err
