"""Test the CUDA code in one call: install the packed wheels, then run one stage after another.

    benchmarks/gpu/run                  on a machine with a GPU, all stages in 540 s
    benchmarks/gpu/run --rehearse       on the CPU, every stage on toy models
    benchmarks/gpu/run --stages training --images DIR    one stage, with more images

Each stage has its own process, time limit and record, OUT/STAGE.json, so that a failure does not
affect the next stage. The exit code is 1 if a stage failed, and 2 if none could run.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import images
import processes
from records import Record

HERE = Path(__file__).resolve().parent
KIT = HERE.parents[1]


class Stage(NamedTuple):
    """A stage and the most seconds that it may take."""

    name: str
    limit: float
    rehearsed: float  # the same in a rehearsal


class InstallError(Exception):
    """What keeps the packed wheels from being installed."""


STAGES = (
    Stage("environment", 40, 60),
    Stage("probes", 150, 180),
    Stage("tests", 120, 60),
    Stage("resume", 40, 60),
    Stage("step", 170, 90),
    Stage("training", 600, 120),
    Stage("pgdat", 600, 120),
)
ON_REQUEST = {"pgdat"}
MARGIN = 8.0  # seconds before the end, for what comes after the last stage


def main() -> int:
    given = arguments()
    ends = time.monotonic() + given.seconds
    if problem := _problem(given):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products need it
    if given.rehearse:  # probes run side by side, on few cores
        os.environ["OMP_NUM_THREADS"] = "1"
    given.out.mkdir(parents=True, exist_ok=True)
    given.work.mkdir(parents=True, exist_ok=True)
    try:
        install(given.work / "site")
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    unpack([KIT / "cifar10", *given.images], given.work / "packed")
    failed = 0
    for stage in STAGES:
        if stage.name not in given.stages:
            continue
        limit = stage.rehearsed if given.rehearse else stage.limit
        failed += not run_stage(given, stage.name, min(limit, ends - time.monotonic() - MARGIN))
    return int(failed > 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    usual = [name for name in names if name not in ON_REQUEST]
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, on toys")
    parser.add_argument("--stages", nargs="+", choices=names, default=usual, metavar="STAGE")
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    place = Path(os.environ.get("OUT", "gpu-records"))
    parser.add_argument("--out", type=Path, default=place, help="where records are written")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "jemkit-gpu",
        help="where packages, data and runs lie; a later call finds them there",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=Path, nargs="*", default=[], help="more packed images, of pack's `rest`"
    )
    given = parser.parse_args()
    given.out, given.work = given.out.resolve(), given.work.resolve()
    return given


def _problem(given: argparse.Namespace) -> str:
    """Why nothing can run; empty where it can."""
    if not any((KIT / "wheels").glob("jemkit-*.whl")):
        return f"{KIT / 'wheels'} has no wheel of jemkit; make a kit by benchmarks/gpu/pack"
    if missing := [str(path) for path in given.images if not path.is_dir()]:
        return f"--images {missing[0]} is not a folder; give the one that pack wrote beside the kit"
    check = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 3)"
    command = [sys.executable, "-c", check]
    code = 0 if given.rehearse else processes.run(command, 90).code
    if code is None:
        return "torch did not answer within 90 s whether there is a CUDA device"
    if code == 3:
        return "torch sees no CUDA device here; use --rehearse for a rehearsal on the CPU"
    return f"{sys.executable} cannot import torch" if code else ""


def install(site: Path) -> None:
    """The packed wheels and nothing else; a second call finds them there."""
    wheels = sorted((KIT / "wheels").glob("*.whl"))
    marker, named = site / ".wheels", "\n".join(f"{w.name} {w.stat().st_mtime_ns}" for w in wheels)
    if not (marker.exists() and marker.read_text() == named):
        shutil.rmtree(site, ignore_errors=True)
        options = ["-q", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site)]
        done = processes.run([*command, *map(str, wheels)], 120)
        if not done.passed:
            raise InstallError(f"the wheels cannot be installed: {done.output[-1000:]}")
        marker.write_text(named)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{site}{os.pathsep}{before}" if before else str(site)


def unpack(sources: list[Path], target: Path) -> None:
    """Gather packed images of several calls in one folder."""
    target.mkdir(exist_ok=True)
    for source in sources:
        for path in sorted(source.glob("*")) if source.is_dir() else ():
            if path.suffix in (".webp", ".xz") or path.name == images.NAMES:
                shutil.copyfile(path, target / path.name)


def run_stage(given: argparse.Namespace, name: str, limit: float) -> bool:
    """One stage in a process of its own; whether it passed."""
    path = given.out / f"{name}.json"
    path.unlink(missing_ok=True)
    if limit < 5:
        Record(path, stage=name, status="not reached")
        print(f"{name:12} not reached", flush=True)
        return False
    where = ["--out", given.out, "--work", given.work, "--seconds", f"{limit - 2:.1f}"]
    kind = ["--device", "cpu", "--toy"] if given.rehearse else ["--device", "cuda"]
    command = processes.python(HERE / "stage.py", name, *where, *kind)
    done = processes.run(command, limit, cwd=given.work)
    record = Record(path, **(Record.read(path) or {"stage": name}))
    record.add(status=done.status, seconds=done.seconds)
    if not done.passed:
        record.add(error=done.output)
    stored = given.work / "records"  # where a later call, whose OUT is another, finds it
    stored.mkdir(exist_ok=True)
    shutil.copyfile(path, stored / path.name)
    print(f"{name:12} {done.status:8} {done.seconds:6.1f} s", flush=True)
    if not done.passed:
        print("    " + "\n    ".join(done.output.strip().splitlines()[-12:]), flush=True)
    return done.passed
