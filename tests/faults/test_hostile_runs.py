"""A run's folder that a stranger sent: nothing outside it is written, and nothing in it hangs."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy_recipe, toy_registry

from jemkit import DataError, JemkitError, train
from jemkit.config.eval_settings import settings_of
from jemkit.evaluation.compare import compare
from jemkit.evaluation.evaluate import judge
from jemkit.evaluation.export import export
from jemkit.evaluation.report import write
from jemkit.evaluation.sample import draw_samples, place, sample_request, save
from jemkit.evaluation.subjects import subject_at
from jemkit.runtime.run_dir import RunFolder

REGISTRY = toy_registry()
CPU = torch.device("cpu")
QUICK = settings_of({"attacks": ("fgsm",), "only": ("accuracy", "robustness")})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and judged."""
    out = tmp_path_factory.mktemp("whole") / "run"
    recipe = toy_recipe(
        REGISTRY, "jem", "jem", "plain", "run.epochs=2", "backbone.network.channels=1",
        "backbone.buffer.capacity=9",
    )  # fmt: skip
    train(recipe, out, registry=REGISTRY)
    evaluate(out)
    return out


def evaluate(run: Path) -> None:
    judge(subject_at(run, REGISTRY, CPU), QUICK, REGISTRY)


def resume(run: Path) -> None:
    recipe = toy_recipe(
        REGISTRY, "jem", "jem", "plain", "run.epochs=2", "backbone.network.channels=1",
        "backbone.buffer.capacity=9",
    )  # fmt: skip
    train(recipe, run, registry=REGISTRY, resume=True)


def sample(run: Path) -> None:
    request = sample_request(
        run, registry=REGISTRY, n=2, steps=1, start=None, source="chains", classes=None, seed=0,
        device="cpu", which="best",
    )  # fmt: skip
    save(draw_samples(request, work=place(request.protocol, None) / ".drawing"))


COMMANDS: dict[str, Callable[[Path], Any]] = {
    "evaluate": evaluate,
    "resume": resume,
    "sample": sample,
    "export": export,
    "report": lambda run: write([run]),
    "compare": lambda run: compare([run]),
}
LINKS = (
    ".lock", ".evaluation.lock", "events.jsonl", "metrics.csv", "evaluation", "samples",
    "checkpoints", "evaluation.json", "evaluation.safetensors", ".evaluation", "export", "latest",
    "config.json", "curves.svg", "energies.svg", "report.html", "samples/.drawing",
    ".evaluation.next.safetensors", "evaluation/energies.png", "checkpoints/best", "tensorboard",
)  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", LINKS)
def test_no_command_writes_outside_a_run(tmp_path: Path, whole: Path, name: str) -> None:
    """Whatever is a link in it: to the same elsewhere, or to nothing yet."""
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    shutil.copytree(whole, run)
    link, theirs = run / name, outside / "theirs"
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        os.rename(link, theirs)
    before = content(outside)
    for command in COMMANDS.values():
        if not link.is_symlink():  # a file that was replaced as a whole
            shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
            link.symlink_to(theirs)
        with suppress(JemkitError, OSError):
            command(run)
        assert content(outside) == before


@pytest.mark.parametrize("name", ["samples", "checkpoints", "events.jsonl", ".lock"])
def test_a_run_whose_parts_are_links_is_refused_before_anything_is_written(
    tmp_path: Path, whole: Path, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    os.rename(run / name, tmp_path / "moved")
    (run / name).symlink_to(tmp_path / "moved")
    before = content(run)
    with pytest.raises(DataError, match="is a link"):
        resume(run)
    assert content(run) == before


def test_a_run_may_itself_be_a_link(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "real")
    (tmp_path / "run").symlink_to(tmp_path / "real")
    for command in COMMANDS.values():
        command(tmp_path / "run")


PLACES = (
    "config.json", "evaluation.json", "metrics.csv", "events.jsonl", "evaluation.safetensors",
    "checkpoints/best/manifest.json", "checkpoints/best/state.json", ".lock", ".evaluation.lock",
    "checkpoints/best/model.safetensors", "samples/epoch-0002.png",
)  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_no_command_waits_for_a_fifo(tmp_path: Path, whole: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for command in COMMANDS.values():
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
        with suppress(JemkitError, OSError):
            command(run)


DAMAGED = {
    "empty": lambda raw: b"",
    "mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "doubled": lambda raw: raw + raw,
    "zeros": lambda raw: raw + b"\0" * 4096,
    "zeros within": lambda raw: raw[:60] + b"\0" * 512 + raw[60:],
    "utf-16": lambda raw: raw.decode().encode("utf-16"),
    "latin": lambda raw: raw + "grün\n".encode("latin-1"),
    "torn": lambda raw: raw[: len(raw) * 2 // 3],
    "torn within": lambda raw: b"\n".join([*raw.split(b"\n")[:3], b"7,1", *raw.split(b"\n")[3:]]),
    "word": lambda raw: raw.replace(b"\n1,", b"\none,").replace(b'"step": 6', b'"step": "six"'),
    "long": lambda raw: raw + b"9" * 6000 + b",1\n",
    "binary": lambda raw: bytes(range(256)) * 9,
    "no line": lambda raw: b"\xff" * 99,
}  # fmt: skip


LOGS = ("metrics.csv", "events.jsonl")


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_logs_stop_nothing(tmp_path: Path, whole: Path, how: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    damaged = {log: DAMAGED[how]((run / log).read_bytes()) for log in LOGS}
    for log, raw in damaged.items():
        (run / log).write_bytes(raw)
    write([run])
    compare([run])
    resume(run)
    rows = RunFolder(run).metrics()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "end"
    assert all(int(row["step"]) >= 0 for row in rows)
    for log, raw in damaged.items():
        aside = run / f"damaged-{log}"
        if aside.exists():
            assert aside.read_bytes() == raw
            assert [e for e in events if e["event"] == "damaged" and aside.name in e["message"]]
        else:  # a half line, or zeros that a lost write left, is cut
            assert how in ("torn", "zeros", "word", "doubled", "empty")


@settings(max_examples=60)
@given(raw=st.binary(max_size=400), joined=st.booleans())
def test_any_bytes_in_place_of_metrics_are_set_aside_or_read(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, raw: bytes, joined: bool
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("any"))
    good = (whole / "metrics.csv").read_bytes()
    (folder.path / "metrics.csv").write_bytes(good + raw if joined else raw)
    folder.mend_logs()
    folder.append_metrics([{"step": 10**6, "loss": 0.5}])
    assert folder.metrics()[-1]["step"] == str(10**6)
