"""A process that starts small runs, or evaluations, and makes faults happen in them; a test reads
the outcome.

Each run is a forked child. Its faults come from an audit hook, which python calls before every
operation on a file: there the child is killed, or finds the disk full.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ranks import in_a_new_process
from states import timeless
from toys import linear_model, toy_recipe, toy_registry

from jemkit import JemkitError, PixelModel, evaluate, train
from jemkit.metrics import record as records
from jemkit.runtime import checkpoint
from jemkit.runtime.disk import Patience, waiting
from jemkit.runtime.pytree import differing
from jemkit.runtime.run_dir import RunFolder
from jemkit.testing import toy_task

REGISTRY = toy_registry()
NAMES = ("jem", "ebjdat", "plain", "run.ema_decay=0.9", "objective.adv_steps=1")
RENAMES = ("os.rename", "os.link", "os.mkdir", "os.truncate")
REMOVES = ("os.remove", "os.rmdir", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND


def writes(event: str, arguments: tuple[Any, ...]) -> bool:
    return event in RENAMES or (event == "open" and bool(arguments[2] & WRITING))


def watch_files(out: Path, at: Callable[[int, bool], None]) -> None:
    """Call at(count, it writes) before each operation on a file below `out`."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in (*RENAMES, *REMOVES, "open"):
            return
        if any(str(out) in str(a) for a in arguments[:2] if isinstance(a, str | Path)):
            count += 1
            at(count, writes(event, arguments))

    sys.addaudithook(hook)


class Training:
    """A run, resumed wherever it stands."""

    @staticmethod
    def go(out: Path, patience: Patience | None = None) -> None:
        resume = (out / "config.json").exists()
        recipe = toy_recipe(REGISTRY, *NAMES)
        train(recipe, out, registry=REGISTRY, resume=resume, patience=patience)

    @staticmethod
    def left(out: Path) -> str:
        """What a fault left behind: nothing yet, a sound newest checkpoint, or why it is not."""
        if not (out / "config.json").exists():
            return "unborn"
        checkpoint.recover(out / "checkpoints")
        damaged = checkpoint.sound(out / "checkpoints").damaged
        return "; ".join(map(str, damaged.values())) or "sound"

    @staticmethod
    def ended(out: Path) -> dict[str, Any]:
        newest = checkpoint.newest(out / "checkpoints")
        if newest is None:
            raise FileNotFoundError(out)
        rows = [{k: v for k, v in r.items() if k != "images/s"} for r in RunFolder(out).metrics()]
        states = {p.name: timeless(checkpoint.load(p)) for p in (newest, newest.parent / "best")}
        return {**states, "metrics": rows}


class Evaluation:
    """An evaluation, started again wherever it stands."""

    @staticmethod
    def go(out: Path, patience: Patience | None = None) -> None:
        subject, images = PixelModel(linear_model(64, 3)), toy_task().images("valid")
        options = {"attacks": ("pgd", "fgsm"), "only": ("accuracy", "robustness", "energies")}
        with waiting(patience or Patience(lambda: False)):
            evaluate(subject, images, registry=REGISTRY, out=out, batch_size=5, **options)

    @staticmethod
    def left(out: Path) -> str:
        """No record yet, one that can be read, or why it cannot."""
        if not (out / records.JSON).exists():
            return "unborn"
        records.load(out)
        return "sound"

    @staticmethod
    def ended(out: Path) -> dict[str, Any]:
        record = records.load(out)
        figures = {f.name: f.value for f in record.figures}
        files = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
        return {"figures": figures, "rows": record.rows, "files": files}


WORKS: dict[str, type[Training] | type[Evaluation]] = {
    "train": Training,
    "evaluate": Evaluation,
}
Work = type[Training] | type[Evaluation]


def child(work: Callable[[], None], after: float | None = None) -> int:
    """Work in a child, killed after so many seconds where they are given; its wait status."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except JemkitError as error:
            print(type(error).__name__, error, file=sys.stderr)
            code = error.exit_code
        except OSError as error:
            print(type(error).__name__, error, file=sys.stderr)
            code = 6
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def killed_at(work: Work, out: Path, count: int) -> int:
    def done() -> None:
        watch_files(out, lambda n, _: os.kill(os.getpid(), signal.SIGKILL) if n == count else None)
        work.go(out)

    return child(done)


def full_at(work: Work, out: Path, count: int, *, for_good: bool) -> int:
    """A disk that is full at the n-th write: only then, or from then on until the run stops."""

    def at(n: int, written: bool) -> None:
        if written and (n == count or (for_good and n > count)):
            raise OSError(errno.ENOSPC, "No space left on device")

    def done() -> None:
        messages: list[str] = []
        patience = Patience(lambda: for_good and len(messages) > 0, messages.append, lambda _: None)
        watch_files(out, at)
        work.go(out, patience)

    return child(done)


def left_by(work: Work, out: Path) -> str:
    try:
        return work.left(out)
    except JemkitError as error:
        return str(error)


def counted(work: Work, out: Path, to: Path) -> None:
    """A run without a fault; how many operations on files and how many seconds it took."""
    operations: list[int] = []
    watch_files(out, lambda n, _: operations.append(n))
    began = time.monotonic()
    work.go(out)
    to.write_text(json.dumps([len(operations), time.monotonic() - began]))


def experiment(folder: Path, what: str, kind: str, faults: list[float]) -> None:
    """Write a JSON list into the folder: a line for each fault, and one for each end of a run."""
    torch.set_num_threads(1)
    work, reference = WORKS[what], folder.parent / f"whole-{what}"
    count = folder.parent / f"count-{what}"
    if not count.exists():  # else another test of this session has run it
        assert child(lambda: counted(work, reference, count)) == 0
    operations, seconds = json.loads(count.read_text())
    assert operations > 30
    whole, left, runs = work.ended(reference), list(faults), 0
    lines: list[dict[str, Any]] = []
    while left:
        out, runs = folder / f"run-{runs}", runs + 1
        done = False
        while left and not done:
            share = left.pop(0)
            at = 1 + int(share * operations)
            if kind == "time":
                status = child(lambda out=out: work.go(out), share * seconds)  # type: ignore[misc]
            elif kind == "kill":
                status = killed_at(work, out, at)
            else:
                status = full_at(work, out, at, for_good=kind == "full")
            lines.append({"status": status, "at": at, "left": left_by(work, out)})
            done = status == 0 or kind in ("full", "once")
        status = child(lambda out=out: work.go(out))  # type: ignore[misc]
        lines.append({"status": status, "differs": list(differing(whole, work.ended(out)))})
    (folder / "lines.json").write_text(json.dumps(lines))


def check(
    folder: Path, what: str, kind: str, faults: Sequence[float], statuses: tuple[int, ...]
) -> None:
    """After each fault the run ends with one of these statuses and is sound; resumed, it ends as
    the run without a fault."""
    in_a_new_process(experiment, folder, what, kind, list(faults))
    lines = json.loads((folder / "lines.json").read_text())
    for line in lines:
        if "differs" in line:
            assert line == {"status": 0, "differs": []}, lines
        else:
            assert line["status"] in statuses, lines
            assert line["left"] in ("sound", "unborn"), lines
