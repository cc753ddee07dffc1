"""`jemkit ls` and `jemkit rm`: runs are listed whatever state they are in, and deleted safely."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Outcome, jemkit, one_line

from jemkit.runtime.lock import LOCK, in_use, locked

EPOCHS = [{"event": "epoch", "epoch": e, "step": 10 * e, "time": 100.0 + e} for e in (1, 2, 3)]
START, END = {"event": "start", "step": 0, "time": 100.0}, {"event": "end", "figures": []}


def figure(name: str, value: float | None, standard: bool = True) -> dict[str, Any]:
    return {"name": name, "value": value, "low": None, "high": None, "n": 9,
            "protocol": {"standard": standard}}  # fmt: skip


def make(
    path: Path,
    *events: dict[str, Any],
    figures: list[Any] | None = None,
    seed: int = 0,
    w1: float = 1.0,
) -> Path:
    """A run as its files are read: `events` after the start, `figures` in the record."""
    recipe = {"backbone": {"use": "sadajem"}, "objective": {"use": "ebjdat", "w1": w1},
              "data": {"use": "digits"}, "run": {"seed": seed, "epochs": 3}}  # fmt: skip
    (path / "checkpoints" / "best").mkdir(parents=True)
    (path / "checkpoints" / "best" / "model.safetensors").write_bytes(b"x" * 1000)
    (path / "config.json").write_text(json.dumps({"recipe": recipe}))
    lines = (json.dumps(event) + "\n" for event in (START | {"time": 100.0 + seed}, *events))
    (path / "events.jsonl").write_text("".join(lines))
    if figures is not None:
        (path / "evaluation.json").write_text(json.dumps({"figures": figures}))
    return path


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four runs, one in a folder of a study, and a link to the newest."""
    monkeypatch.chdir(tmp_path)
    best = [
        figure("clean", 0.5, False),
        figure("clean", 0.9),
        figure("pgd20", 0.7),
        figure("aa", 0.6),
    ]
    make(Path("runs/a"), *EPOCHS, END, figures=[*best, figure("fid", None)])
    make(Path("runs/b"), *EPOCHS[:2], {"event": "diverged"}, seed=1, w1=8)
    make(Path("runs/study/c"), *EPOCHS[:2], {"event": "rollback", "to": 10}, seed=2)
    end = END | {"figures": [figure("clean", 0.95), figure("pgd20", 0.2, False)]}
    make(Path("runs/d"), *EPOCHS, end, seed=3)
    Path("runs/latest").symlink_to("d")
    return Path("runs")


def listed(*options: str) -> Any:
    done = jemkit("ls", *options, "--json")
    assert done.code == 0, done.err
    return done.record


def names(*options: str) -> list[str]:
    return [run["run"] for run in listed(*options)["runs"]]


def test_every_run_is_listed_with_its_state_epochs_and_figures(runs: Path) -> None:
    rows = {run["run"]: run for run in listed()["runs"]}
    assert list(rows) == ["a", "b", "study/c", "d"]  # by date; the link is no run
    states = [(run["state"], run["epochs_done"]) for run in rows.values()]
    assert states == [("finished", 3), ("diverged", 2), ("interrupted", 1), ("finished", 3)]
    assert rows["a"]["figures"]["clean"] == {"name": "clean", "value": 0.9, "standard": True}
    assert rows["a"]["figures"]["fid"]["value"] is None
    assert rows["d"]["figures"]["pgd"]["value"] == 0.2  # of the end of training
    assert rows["a"]["bytes"] > 1000
    with locked(runs / "study" / "c" / LOCK, "trains"):
        assert names("--state=running") == ["study/c"]
        assert names("runs/study/c", "--state=running") == ["c"]


def test_the_table_shows_figures_and_marks_those_of_other_protocols(runs: Path) -> None:
    out = jemkit("ls", str(runs)).out
    assert "90.00%  70.00%    60.00%  not finite" in out
    assert "20.00% ~" in out
    assert out.count("\n") == 7
    assert "4 runs, 0.0 MB" in out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--backbone=sadajem", "--objective=ebjdat", "--dataset=digits"), "abcd"),
        (("--where=run.seed=1",), "b"),
        (("--where=objective.w1=8.0", "--where=run.epochs=3"), "b"),
        (("--sort=clean",), "dabc"),
        (("--sort=aa", "--reverse"), "bcda"),
        (("--sort=name", "--reverse"), "cdba"),
    ],
)
def test_filters_and_orders(runs: Path, options: tuple[str, ...], expected: str) -> None:
    assert "".join(name[-1] for name in names(str(runs), *options)) == expected


@pytest.mark.usefixtures("runs")
def test_what_no_run_can_match_is_refused() -> None:
    for option in ("--where=objective.w9=1", "--where=w1", "--sort=colour", "--backbone=jem"):
        done = jemkit("ls", option)
        assert done.code == (0 if option == "--backbone=jem" else 2), done.err
    assert "none of 4 runs in runs matches" in done.out
    assert "is no folder" in one_line(jemkit("ls", "nowhere"), 6)


def test_damaged_runs_are_named_and_the_others_are_listed(runs: Path) -> None:
    (runs / "a" / "config.json").write_text('{"recipe": ')
    (runs / "b" / "config.json").write_text("[]")
    (runs / "d" / "evaluation.json").write_text("{}")
    (runs / "study" / "c" / "events.jsonl").write_bytes(b"\xff\x00 no event")
    answer = listed()
    assert [Path(one["path"]).name for one in answer["damaged"]] == ["a", "b"]
    assert [run["run"] for run in answer["runs"] if run["damaged"]] == ["d", "study/c"]
    out = jemkit("ls").out
    assert out.count("damaged: ") == 4
    assert "runs/a/config.json is no JSON: " in out


@pytest.mark.parametrize(
    ("line", "figures"),
    [
        ('{"event": "end", "step": 3}', {}),
        ('{"event": "start", "time": 1e300}', {}),
        ('{"event": "start", "time": NaN}', {}),
        (f'{{"event": "end", "figures": [{{"name": "clean", "value": 1{"0" * 400}}}]}}',
         {"clean": {"name": "clean", "value": None, "standard": False}}),
    ],
)  # fmt: skip
def test_odd_values_in_the_files_of_a_run_are_no_error(
    runs: Path, line: str, figures: dict[str, Any]
) -> None:
    config = runs / "b" / "config.json"
    config.write_text(config.read_text().replace('"seed": 1', '"seed": NaN'))
    (runs / "b" / "events.jsonl").write_text(f"{line}\n")
    (row,) = listed("runs/b")["runs"]
    assert (row["seed"], row["figures"]) == (None, figures)
    assert "\n1 run, 0.0 MB" in jemkit("ls", "runs/b").out


def test_a_setting_that_is_unset_is_no_unknown_one(runs: Path) -> None:
    config = runs / "b" / "config.json"
    config.write_text(config.read_text().replace('"epochs": 3', '"epochs": 3, "minutes": null'))
    assert names("--where=run.minutes=null") == ["b"]
    assert names("--where=run.minutes=3") == []


@pytest.mark.usefixtures("runs")
def test_the_list_is_made_without_torch() -> None:
    code = (
        "import sys; from jemkit_cli.app import main; main(['ls', '--json']); "
        "main(['rm', 'runs/b', '--yes']); assert not {'torch', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class TestRemoving:
    def removed(self, *arguments: str) -> Outcome:
        done = jemkit("rm", *arguments, "--yes")
        assert done.code == 0, done.err
        return done

    def test_runs_are_deleted_and_latest_points_to_the_newest_left(self, runs: Path) -> None:
        done = self.removed("runs/a", "runs/latest", "--json").record
        assert names() == ["b", "study/c"]
        assert os.readlink(runs / "latest") == "study/c"
        assert done["bytes"] > 2000
        assert [Path(one["path"]).name for one in done["deleted"]] == ["a", "d"]
        out = self.removed("runs/b", "runs/study/c").out
        assert "freed 0.0 MB" in out
        assert "deleted: no run is left" in out
        assert [p.name for p in runs.iterdir()] == ["study"]

    def test_checkpoints_alone_are_deleted_and_figures_stay(self, runs: Path) -> None:
        for _ in range(2):  # the second time there is nothing left to delete
            self.removed("runs/a", "--checkpoints")
        assert not (runs / "a" / "checkpoints").exists()
        (row,) = listed("runs/a")["runs"]
        assert row["figures"]["aa"]["value"] == 0.6
        self.removed("runs/a")
        assert not (runs / "a").exists()

    def test_without_a_terminal_it_needs_yes(self, runs: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
        assert jemkit("rm", "runs/a").code == 2
        assert names() == ["a", "b", "study/c", "d"]

    @pytest.mark.parametrize(("answer", "left"), [("n\n", True), ("y\n", False), ("", True)])
    def test_on_a_terminal_it_asks(
        self, runs: Path, answer: str, left: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdin", _Terminal(answer))
        done = jemkit("rm", "runs/a")
        assert (runs / "a").exists() == left
        assert done.code == int(left)

    def test_what_is_no_run_is_refused_and_nothing_is_deleted(self, runs: Path) -> None:
        shutil.copytree(runs / "a", "project")
        Path("project/config.json").write_text('{"model": "mine"}')
        shutil.copytree(runs / "a", "outer/a")
        (Path("outer") / "config.json").write_text((runs / "a" / "config.json").read_text())
        (Path("outer") / "events.jsonl").touch()
        Path("elsewhere").mkdir()
        make(Path("elsewhere/e"))
        (runs / "link").symlink_to("../elsewhere/e")
        reasons = {"project": "is not a run", "runs": "is not a run", "nowhere": "does not exist",
                   "runs/a/checkpoints": "is not a run", "outer": "has another run in it",
                   "runs/a/config.json": "is not a run", "runs/link": "name "}  # fmt: skip
        before = sorted(map(str, Path().rglob("*")))
        for path, reason in reasons.items():
            assert reason in one_line(jemkit("rm", "runs/b", path, "--yes"), 6)
        assert sorted(map(str, Path().rglob("*"))) == before

    def test_a_running_run_is_refused(self, runs: Path) -> None:
        with locked(runs / "b" / LOCK, "has trained in b"):
            message = one_line(jemkit("rm", "runs/a", "runs/b", "--yes"), 3)
        assert "runs/b is in use: process" in message
        assert (runs / "a").exists()

    def test_links_in_a_run_are_deleted_but_not_what_they_point_to(self, runs: Path) -> None:
        Path("big").mkdir()
        Path("big/file").touch()
        (runs / "a" / "samples").symlink_to("../../big")
        self.removed("runs/a")
        assert Path("big/file").exists()
        shutil.rmtree(runs / "b" / "checkpoints")
        (runs / "b" / "checkpoints").symlink_to("../../big")
        assert "is a link" in one_line(jemkit("rm", "runs/b", "--checkpoints", "--yes"), 6)

    def test_a_damaged_run_and_what_a_kill_left_can_be_deleted(self, runs: Path) -> None:
        (runs / "a" / "checkpoints" / "best" / "manifest.json").touch()
        (runs / "a" / "config.json").unlink()
        self.removed("runs/a")
        (runs / "b").rename(runs / ".b.removed")
        assert "`jemkit rm runs/.b.removed` deletes it" in jemkit("ls").out
        self.removed("runs/.b.removed")
        assert names() == ["study/c", "d"]


class _Terminal:
    """Standard input that a person answers at."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self, *_: Any) -> str:
        answer, self.answer = self.answer, ""
        return answer


@pytest.mark.usefixtures("runs")
def test_a_run_that_is_being_evaluated_is_not_deleted() -> None:
    with in_use(Path("runs/a")):
        done = jemkit("rm", "runs/a", "--yes")
    assert "is in use: another process evaluates or deletes it" in one_line(done, 3)
    assert Path("runs/a/config.json").exists()
