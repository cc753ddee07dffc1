"""A process that starts small runs, or evaluations, and lets faults befall them; a test reads what
came of it.

Each run is a forked child. Its faults come from an audit hook, which python calls before every
operation on a file: there the child is killed, or finds the disk full.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
torch.set_num_threads(1)

from states import timeless  # noqa: E402
from toys import linear_model, toy_recipe, toy_registry  # noqa: E402

from jemkit import JemkitError, PixelModel, evaluate, train  # noqa: E402
from jemkit.metrics import record as records  # noqa: E402
from jemkit.runtime import checkpoint  # noqa: E402
from jemkit.runtime.disk import Patience, waiting  # noqa: E402
from jemkit.runtime.pytree import differing  # noqa: E402
from jemkit.runtime.run_dir import RunFolder  # noqa: E402
from jemkit.testing import toy_task  # noqa: E402

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
    """A run, gone on with wherever it stands."""

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
        found = checkpoint.sound(out / "checkpoints")
        return "; ".join(map(str, found.damaged.values())) or "sound"

    @staticmethod
    def ended(out: Path) -> dict[str, Any]:
        newest = checkpoint.newest(out / "checkpoints")
        if newest is None:
            raise FileNotFoundError(out)
        rows = [{k: v for k, v in r.items() if k != "images/s"} for r in RunFolder(out).metrics()]
        states = {p.name: timeless(checkpoint.load(p)) for p in (newest, newest.parent / "best")}
        return {**states, "metrics": rows}


class Evaluation:
    """An evaluation, asked for again wherever it stands."""

    @staticmethod
    def go(out: Path, patience: Patience | None = None) -> None:
        subject, images = PixelModel(linear_model(64, 3)), toy_task().images("valid")
        asked = {"attacks": ("pgd", "fgsm"), "only": ("accuracy", "robustness", "energies")}
        with waiting(patience or Patience(lambda: False)):
            evaluate(subject, images, registry=REGISTRY, out=out, batch_size=5, **asked)

    @staticmethod
    def left(out: Path) -> str:
        """No record yet, one that can be read, or why it cannot."""
        if not (out / records.JSON).exists():
            return "unborn"
        records.load(out)
        return "sound"

    @staticmethod
    def ended(out: Path) -> dict[str, Any]:
        found = records.load(out)
        figures = {f.name: f.value for f in found.figures}
        files = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
        return {"figures": figures, "rows": found.rows, "files": files}


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
    """A disk that is full at the n-th write: only then, or from then on until a stop is asked."""

    def at(n: int, written: bool) -> None:
        if written and (n == count or (for_good and n > count)):
            raise OSError(errno.ENOSPC, "No space left on device")

    def done() -> None:
        told: list[str] = []
        patience = Patience(lambda: for_good and len(told) > 0, told.append, lambda _: None)
        watch_files(out, at)
        work.go(out, patience)

    return child(done)


def left_by(work: Work, out: Path) -> str:
    try:
        return work.left(out)
    except JemkitError as error:
        return str(error)


def counted(work: Work, out: Path, to: Path) -> None:
    """What no fault befalls; how many operations on files and how many seconds it took."""
    seen: list[int] = []
    watch_files(out, lambda n, _: seen.append(n))
    began = time.monotonic()
    work.go(out)
    to.write_text(json.dumps([len(seen), time.monotonic() - began]))


def main() -> None:
    """{"folder", "what", "kind", "faults"}, faults as shares of undisturbed work; a JSON line."""
    asked = json.loads(sys.stdin.read())
    folder, work = Path(asked["folder"]), WORKS[asked["what"]]
    status = child(lambda: counted(work, folder / "whole", folder / "count"))
    operations, seconds = json.loads((folder / "count").read_text())
    whole, left, runs = work.ended(folder / "whole"), list(asked["faults"]), 0
    told: list[dict[str, Any]] = [{"status": status, "operations": operations}]
    while left:
        out, runs = folder / f"run-{runs}", runs + 1
        done = False
        while left and not done:
            share = left.pop(0)
            at = 1 + int(share * operations)
            if asked["kind"] == "time":
                status = child(lambda out=out: work.go(out), share * seconds)  # type: ignore[misc]
            elif asked["kind"] == "kill":
                status = killed_at(work, out, at)
            else:
                status = full_at(work, out, at, for_good=asked["kind"] == "full")
            told.append({"status": status, "at": at, "left": left_by(work, out)})
            done = status == 0 or asked["kind"] in ("full", "once")
        status = child(lambda out=out: work.go(out))  # type: ignore[misc]
        told.append({"status": status, "differs": list(differing(whole, work.ended(out)))})
    print(json.dumps(told))


if __name__ == "__main__":
    main()
