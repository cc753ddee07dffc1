"""The kit for a bare GPU machine: what it packs, and that one stage costs the next nothing."""

import json
import lzma
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toys import root
from waiting import until

sys.path.insert(0, str(root() / "benchmarks" / "gpu"))

import images
import packing
import probes
import processes
import runner
import stage_probes
import stage_step
import stage_tests
import stage_training
from records import Record
from stage import Given


def batch_file(labels: list[int], seed: int = 0) -> tuple[bytes, np.ndarray]:
    """A batch file's bytes as CIFAR-10 has them, and its pixels [N, 3, 32, 32]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3, 32, 32), np.uint8)
    block = pixels.tobytes()
    listed = b"".join(b"K" + bytes([label]) for label in labels)
    size = len(block).to_bytes(4, "little")
    content = b"\x80\x02}(U\x06labels](" + listed + b"eU\x04dataT" + size + block + b"u."
    return content, pixels


@settings(max_examples=15)
@given(labels=st.lists(st.integers(0, 9), min_size=1, max_size=7), seed=st.integers(0, 99))
def test_a_batch_file_comes_back_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, labels: list[int], seed: int
) -> None:
    place = tmp_path_factory.mktemp("batch")
    content, _ = batch_file(labels, seed)
    (place / "test_batch").write_bytes(content)
    images.squeeze(place / "test_batch", place / "packed")
    assert images.restore("test_batch", place / "packed", place / "back").read_bytes() == content


def test_images_come_back_as_png_by_class(tmp_path: Path) -> None:
    labels = [3, 0, 3]
    content, pixels = batch_file(labels)
    (tmp_path / "test_batch").write_bytes(content)
    images.squeeze(tmp_path / "test_batch", tmp_path / "packed")
    assert images.export_png("test_batch", tmp_path / "packed", tmp_path / "png") == 3
    for index, label in enumerate(labels):
        path = tmp_path / "png" / f"class-{label}" / f"test_batch-{index:05d}.png"
        assert np.array_equal(np.asarray(Image.open(path)), pixels[index].transpose(1, 2, 0))


def test_changed_pixels_are_refused(tmp_path: Path) -> None:
    content, _ = batch_file([1, 2])
    (tmp_path / "test_batch").write_bytes(content)
    images.squeeze(tmp_path / "test_batch", tmp_path)
    picture = np.asarray(Image.open(tmp_path / "test_batch.webp")).copy()
    picture[0, 0, 0] ^= 1
    Image.fromarray(picture).save(tmp_path / "test_batch.webp", lossless=True)
    with pytest.raises(OSError, match="md5"):
        images.restore("test_batch", tmp_path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_file_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(b"T\x01\x00\x00\x00 nothing here")
    with pytest.raises(ValueError, match="no block of 32 x 32 images"):
        images.squeeze(tmp_path / "test_batch", tmp_path)


def test_every_packed_version_is_pinned() -> None:
    assert all(packing.version_of(name)[0].isdigit() for name in packing.PACKAGES)
    with pytest.raises(packing.PackError, match="pins no version of nothing"):
        packing.version_of("nothing")


def test_a_wheel_loses_a_folder_and_its_lines_in_record(tmp_path: Path) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    record = "a/big/x.pt,sha256=1,9\na/__init__.py,sha256=2,0\n"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("a/big/x.pt", b"x" * 1000)
        file.writestr("a/__init__.py", b"")
        file.writestr("a-1.dist-info/RECORD", record)
    packing.without(wheel, "a/big/")
    with zipfile.ZipFile(wheel) as file:
        assert sorted(file.namelist()) == ["a-1.dist-info/RECORD", "a/__init__.py"]
        assert file.read("a-1.dist-info/RECORD") == b"a/__init__.py,sha256=2,0\n"


def test_every_cuda_test_is_collected_in_the_kit(tmp_path: Path) -> None:
    packing.copy_files(tmp_path)
    ours = [path for path in sys.path if not Path(path).is_relative_to(root() / "tests")]
    marked = stage_tests.marked(root() / "tests")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-m", "cuda",
         "--collect-only", "--assert=plain", *marked],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(ours)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_images_beyond_the_limit_lie_beside_the_kit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / images.FOLDER
    folder.mkdir()
    for i, name in enumerate(images.BATCHES):
        (folder / name).write_bytes(batch_file([i], i)[0])
    (folder / images.NAMES).write_bytes(b"names")
    monkeypatch.setattr(packing, "LIMIT", 10_000)  # two of some 4 KB
    (tmp_path / "kit").mkdir()
    packing.store_images(packing._batches(tmp_path), tmp_path / "kit", tmp_path / "rest")
    packed = {path.name for path in (tmp_path / "kit" / "cifar10").glob("*.webp")}
    others = {path.name for path in (tmp_path / "rest").glob("*.webp")}
    assert "test_batch.webp" in packed
    assert 0 < len(packed) < 6
    assert packed | others == {f"{name}.webp" for name in images.BATCHES}
    assert packing.size_of(tmp_path / "kit") <= 10_000 + len(b"names")


def test_missing_batches_are_named(tmp_path: Path) -> None:
    with pytest.raises(packing.PackError, match=r"test_batch is missing; give --data-dir"):
        packing._batches(tmp_path)


def limit_once(ready: Callable[[list[str]], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a command comes once it is ready, and a moment later; not before."""
    wait = processes._wait

    def waited(process: Any, limit: float, grace: float) -> int | None:
        until(lambda: process.poll() is not None or ready(process.args), "the command")
        return wait(process, min(limit, 0.2), grace)

    monkeypatch.setattr(processes, "_wait", waited)


@pytest.mark.parametrize("apart", [False, True])  # a session of its own, as probes have
def test_a_command_ends_at_its_limit_with_all_that_it_started(
    tmp_path: Path, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "pid"
    child = f"import os, time; open({str(mark)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(60)"
    limit_once(lambda _: mark.exists() and mark.read_text().endswith(" "), monkeypatch)
    code = (
        "import subprocess, sys; print('began', flush=True); "
        f"subprocess.run([sys.executable, '-c', {child!r}], start_new_session={apart})"
    )
    done = processes.run([sys.executable, "-c", code], 60)
    assert (done.status, done.code) == ("timeout", None)
    assert "began" in done.output
    pid = int(mark.read_text())
    until(lambda: not _alive(pid), "the kernel to sweep it up")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_command_may_save_before_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    limit_once(lambda _: "ready" in log.read_text(), monkeypatch)
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    done = processes.run([sys.executable, "-c", code], 60, grace=1800, log=log)
    assert (done.status, done.code) == ("failed", 5)


@pytest.mark.parametrize(("code", "status"), [(0, "passed"), (3, "failed")])
def test_an_exit_code_is_a_status(code: int, status: str) -> None:
    done = processes.run([sys.executable, "-c", f"print(7); raise SystemExit({code})"], 30)
    assert (done.status, done.code, done.output) == (status, code, "7\n")


FAKE = """
import json, sys, time
from pathlib import Path
name, out = sys.argv[1], Path(sys.argv[sys.argv.index("--out") + 1])
(out / f"{name}.json").write_text(json.dumps({"stage": name, "seen": 1}))
if name == "probes":
    raise RuntimeError("a probe broke")
if name == "tests":
    time.sleep(60)
"""


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit whose stages are stand-ins: one passes, one fails, one never ends."""
    folder = tmp_path / "kit"
    (folder / "wheels").mkdir(parents=True)
    (folder / "stage.py").write_text(FAKE)
    monkeypatch.setattr(runner, "HERE", folder)
    monkeypatch.setattr(runner, "KIT", folder)
    monkeypatch.setattr(runner, "install", lambda site: None)
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    return folder


def started(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["run", *map(str, options)])
    return runner.main()


def test_a_stage_that_fails_or_hangs_costs_the_next_nothing(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (kit / "wheels" / "jemkit-1-py3-none-any.whl").touch()
    where = ["--out", tmp_path / "out", "--work", tmp_path / "work"]
    names = ["environment", "probes", "tests", "resume"]

    def hangs(command: list[str]) -> bool:
        record = tmp_path / "out" / "tests.json"
        return "tests" in command and record.exists() and record.read_text().endswith("}")

    limit_once(hangs, monkeypatch)
    assert started(monkeypatch, "--rehearse", *where, "--stages", *names) == 1
    records = {n: json.loads((tmp_path / "out" / f"{n}.json").read_text()) for n in names}
    statuses = {name: record["status"] for name, record in records.items()}
    wanted = ["passed", "failed", "timeout", "passed"]
    assert statuses == dict(zip(names, wanted, strict=True))
    assert "a probe broke" in records["probes"]["error"]
    assert all(record["seen"] == 1 for record in records.values())
    assert "a probe broke" in capsys.readouterr().out


def test_stages_beyond_the_time_are_not_begun(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kit / "wheels" / "jemkit-1-py3-none-any.whl").touch()
    where = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--seconds", 9]
    assert started(monkeypatch, "--rehearse", *where, "--stages", "resume") == 1
    assert json.loads((tmp_path / "out" / "resume.json").read_text())["status"] == "not reached"


def test_without_a_wheel_or_a_device_nothing_begins(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(monkeypatch, "--rehearse", "--out", tmp_path / "out") == 2
    assert "make a kit by benchmarks/gpu/pack" in capsys.readouterr().err
    (kit / "wheels" / "jemkit-1-py3-none-any.whl").touch()
    done = processes.Outcome("failed", 1.0, "", 3)
    monkeypatch.setattr(processes, "run", lambda *_, **__: done)
    assert started(monkeypatch, "--out", tmp_path / "out") == 2
    assert "torch sees no CUDA device here; use --rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_record_is_whole_after_every_figure(tmp_path: Path) -> None:
    record = Record(tmp_path / "a.json", stage="a")
    assert Record.read(tmp_path / "a.json") == {"stage": "a"}
    record.add(x=1)
    assert Record.read(tmp_path / "a.json") == {"stage": "a", "x": 1}
    assert Record.read(tmp_path / "none.json") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_every_probe_is_run() -> None:
    assert sorted(probe.__name__ for probe in probes.PROBES) == sorted(stage_probes.NAMES)


@given(seconds=st.floats(60, 600), count=st.integers(1000, 50_000), step=st.floats(0.001, 1))
def test_epochs_fit_into_the_time(seconds: float, count: int, step: float) -> None:
    epochs = stage_training.epochs_in(seconds, count, step)
    taken = epochs * (int(0.9 * count / 128) * step + stage_training.VALIDATION)
    assert epochs == 1 or taken + stage_training.START <= seconds


def test_ratios_are_to_the_released_step_of_the_same_network() -> None:
    content = {
        "stage": "step",
        "a released": {"step_s": 3.0},
        "a bf16": {"step_s": 0.5},
        "b bf16": {"step_s": 1.0},
        "a fp32": {"status": "timeout"},
    }
    assert stage_step.against_released(content) == {"released / this": {"a bf16": 6.0}}


@pytest.mark.parametrize("packed", [0, 3, 6])
def test_the_run_takes_what_was_carried(tmp_path: Path, packed: int) -> None:
    source = tmp_path / "packed"
    for i, name in enumerate(images.BATCHES[:packed]):
        (tmp_path / name).write_bytes(batch_file([i, 1], i)[0])
        images.squeeze(tmp_path / name, source)
    if packed:
        (source / images.NAMES).write_bytes(b"names")
    where = Given("cpu", True, tmp_path / "out", tmp_path, float("inf"))
    options, count = stage_training.dataset(where)
    named = {0: "digits", 3: "folder", 6: "cifar10"}[packed]
    assert options[:2] == ["--dataset", named]
    assert count == {0: 1297, 3: 4, 6: 50_000}[packed]
    if packed == 3:
        assert len(list((tmp_path / "data" / "train").rglob("*.png"))) == 4
        assert len(list((tmp_path / "data" / "test").rglob("*.png"))) == 2


def test_what_comes_back_keeps_to_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "evaluation.json").write_bytes(b"x" * 400)
    (run / "metrics.csv").write_bytes(b"x" * 400)
    (run / "curves.svg").write_bytes(b"x" * 100)
    monkeypatch.setattr(stage_training, "MOST", 600)
    sizes = stage_training.bring_back(run, tmp_path / "back.zip")
    assert sizes == {"run-evaluation.json": 400, "run-curves.svg": 100}
    assert zipfile.ZipFile(tmp_path / "back.zip").namelist() == list(sizes)


def test_labels_of_the_packed_header_are_compressed_with_it(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(batch_file([4, 5, 6])[0])
    images.squeeze(tmp_path / "data_batch_1", tmp_path)
    around = json.loads(lzma.decompress((tmp_path / "data_batch_1.xz").read_bytes()))
    assert images._labels(around) == [4, 5, 6]


def test_a_late_line_on_standard_error_spoils_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(command: list[str], _: float) -> processes.Outcome:
        path = Path(command[command.index("--result") + 1])
        path.write_text(json.dumps({"combinations": 3}))
        return processes.Outcome("passed", 1.0, '{"combinations": 3}\nresource_tracker: late\n', 0)

    monkeypatch.setattr(processes, "run", late)
    where = Given("cpu", True, tmp_path, tmp_path, float("inf"))
    record = Record(tmp_path / "probes.json")
    stage_probes.measure(where, record)
    assert set(record.content) == set(stage_probes.NAMES)
    assert all(each["found"] == {"combinations": 3} for each in record.content.values())


def test_the_files_with_cuda_tests_are_listed() -> None:
    assert "tests/gpu/test_cuda.py" in stage_tests.marked(root() / "tests")
