"""The command does what README says: it samples, lists, shows, and refuses in one line."""

import errno
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import CLASSIFIER, Outcome, jemkit, one_line
from PIL import Image

from jemkit import installed, resolve
from jemkit.config.recipe import complete


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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

    def test_all_mistakes_are_reported_at_once(self) -> None:
        done = jemkit("train", "--set=backbone.stps=5", "--set=run.seed=-1")
        assert (done.code, done.err.count("\n")) == (3, 2)


class TestSample:
    def test_fresh_chains_give_a_grid_and_an_array_with_its_protocol(
        self, trained: tuple[Path, Outcome]
    ) -> None:
        home, done = trained
        arguments = ("sample", str(home / "runs" / "latest"), "--n=12", "--steps=2", "--json")
        drawn = jemkit(*arguments, "--class=3", "--class=1", "--start=uniform", "--out=here")
        assert drawn.code == 0, drawn.err
        record = drawn.record
        with np.load(record["npz"], allow_pickle=False) as archive:
            assert archive["image"].shape == (12, 8, 8, 1)
            assert archive["image"].dtype == np.uint8
            assert archive["label"].tolist() == [3] * 6 + [1] * 6
            protocol = json.loads(str(archive["protocol"]))
        assert protocol == record["protocol"]
        assert (protocol["start"], protocol["steps"], protocol["class"]) == ("uniform", 2, [3, 1])
        assert protocol["sampler"]["use"] == "sgld"
        assert protocol["sha256"] in (home / done.record["run"] / "events.jsonl").read_text()
        Image.open(record["png"]).verify()

    def test_one_seed_gives_the_same_images(self, trained: tuple[Path, Outcome]) -> None:
        home, _ = trained
        run = str(home / "runs" / "latest")
        images = []
        for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
            arguments = ("--n=3", "--steps=2", f"--seed={seed}", f"--out={folder}", "--json")
            with np.load(jemkit("sample", run, *arguments).record["npz"]) as archive:
                images.append(archive["image"])
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
        twice = jemkit("sample", run, "--class=3", "--class=1", "--class=3")
        assert "class 3 is requested twice" in one_line(twice, 2)
        for label in ("\u00b2", "9" * 5000):  # a digit that is no number, a number without end
            done = jemkit("sample", run, f"--class={label}")
            assert "expected a number" in one_line(done, 3)
        assert "0 images: expected 1 or more" in one_line(jemkit("sample", run, "--n=0"), 2)
        assert "-1 steps: expected 0 or more" in one_line(jemkit("sample", run, "--steps=-1"), 2)
        Path("taken").write_text("a file")
        occupied = jemkit("sample", run, "--n=1", "--steps=1", "--out=taken")
        assert "a part of this path is a file" in one_line(occupied, 6)
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
        (part,) = json.loads(jemkit("plugins", "info", "sadajem", "--json").out)
        options = {option["name"]: option["default"] for option in part["options"]}
        assert options["steps"] == 10
        assert options["sampler"]["use"] == "sgld"
        assert "CVPR" in part["doc"] or "WideResNet" in part["doc"]
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
        shown = json.loads(done.out)
        assert shown["origins"]["run.epochs"] == "option"
        assert shown["origins"]["run.seed"] == "--set run.seed=4"
        assert shown["origins"]["run.ema_decay"] == "default"

    def test_the_schema_is_json_and_knows_every_part(self) -> None:
        schema = json.loads(jemkit("config", "schema").out)
        assert set(schema["recipe"]["properties"]) >= {"run", "data", "backbone", "objective"}
        network = schema["parts"]["backbone"]["jem"]["properties"]["network"]
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

    def test_a_full_disk_behind_standard_output_is_one_message(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("jemkit_cli.plugins.listing.say_json", full)
        done = jemkit("plugins", "list", "--json", "--no-plugins")
        assert "cannot be written: No space left on device" in one_line(done, 6)

    def test_no_command_shows_the_help(self) -> None:
        done = jemkit()
        assert "train" in done.out + done.err
        assert "Traceback" not in done.err
