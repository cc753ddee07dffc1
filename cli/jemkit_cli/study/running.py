"""Trains and evaluates the missing runs of a study, each in its own process."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from jemkit.errors import ConfigError, DataError, Diverged, JemkitError, Preempted
from jemkit.runtime.files import read_json, write_json
from jemkit.runtime.lock import LOCK, locked
from jemkit.runtime.opening import make_folder
from jemkit_cli.study.plan import LAST, Evaluation, Study, Unit
from jemkit_cli.study.statistics import StatisticsFile, study_statistics
from jemkit_cli.terminal import STOPPED

MARK = "study.json"
"""File in a run's folder: what has been done for a study, and with which options."""
POLL = 0.2
"""Seconds between two checks of a process and of signals."""


Call = Callable[[list[str], threading.Event, Path], str]
"""Runs a jemkit command in a folder, and returns its standard output."""


class Failed(JemkitError):
    """A run of a study failed; the exit code is that of its command."""


class State(NamedTuple):
    """The progress of a run."""

    trained: dict[str, Any] | None  # the JSON line of `jemkit train`, or {"diverged": message}
    evaluated: tuple[Evaluation, ...] = ()  # the options of each evaluation that is complete
    weights: str | None = None  # SHA-256 of those that were evaluated; None: of the last record

    @property
    def diverged(self) -> bool:
        return self.trained is not None and "diverged" in self.trained

    def missing(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """The evaluations that are still to be run; none of a run that diverged."""
        return [] if self.diverged else [e for e in evaluations if e not in self.evaluated]

    def complete(self, evaluations: Sequence[Evaluation]) -> bool:
        return self.trained is not None and not self.missing(evaluations)


def state_of(unit: Unit) -> State:
    """The progress stored in the run's folder."""
    path = unit.folder / MARK
    if not path.exists():
        return State(None)
    mark = read_json(path)
    if isinstance(mark, dict):
        one = mark.get("evaluated") or []
        if isinstance(one, list) and all(isinstance(text, str) for text in one):
            mark = {**mark, "evaluated": [one] if one else []}  # of at most one evaluation
    try:
        return TypeAdapter(State).validate_python(mark)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path} is damaged: {where}: {first['msg']}. Delete it, and the run is evaluated again"
        ) from None


def run_all(
    units: Sequence[Unit],
    study: Study,
    out: Path,
    *,
    jobs: int,
    report: Callable[[str], None],
    progress: Callable[[str, int, int], None] | None,
    stop: Callable[[], bool],
    call: Call | None = None,
    options: Sequence[str] = (),
) -> None:
    """Complete every run; runs that diverge are marked, and the others continue.

    `out` has the file of statistics that an evaluation may name; it is computed first. `options`
    are passed to every command.
    Raises Preempted if `stop` returns true: the runs are saved, and the same call continues.
    """
    stopped = threading.Event()
    begun: dict[str, Future[None]] = {}
    missing = [e for unit in units for e in state_of(unit).missing(study.evaluations(unit.row))]
    reference = study_statistics(units, missing, out)
    shared = _Shared(study, reference, report, stopped, call or _call, options)
    with ThreadPoolExecutor(jobs) as pool:
        if reference is not None:
            begun["statistics"] = pool.submit(_write_statistics, reference, shared)
        for unit in units:
            before = [begun[u.key] for u in units if u.key in begun and _leads(u, unit)]
            if unit.key not in begun:  # two rows may be one recipe
                begun[unit.key] = pool.submit(_run, unit, units, before, begun, shared)
        waiting = set(begun.values())
        while waiting:
            done, waiting = wait(waiting, POLL, return_when=FIRST_EXCEPTION)
            if progress is not None:
                progress("runs", len(begun) - len(waiting), len(begun))
            failed = [future for future in done if future.exception() is not None]
            if stop() or failed:
                stopped.set()
    errors = [error for future in begun.values() if (error := future.exception()) is not None]
    own = [error for error in errors if not isinstance(error, Preempted)]
    for error in own or errors:
        raise error


class _Shared(NamedTuple):
    """What the runs of a study share."""

    study: Study
    statistics: StatisticsFile | None  # what `{statistics}` stands for
    report: Callable[[str], None]
    stopped: threading.Event
    call: Call
    options: Sequence[str]


def _write_statistics(wanted: StatisticsFile, shared: _Shared) -> None:
    folder = wanted.file.parent
    if not wanted.file.exists():
        make_folder(folder)
        shared.call([*wanted.command, *shared.options], shared.stopped, folder)
        shared.report(f"statistics {wanted.file}")


def _leads(one: Unit, other: Unit) -> bool:
    """Whether the other starts from the weights of this run."""
    return other.row.after == one.row.name and other.seed == one.seed


def _run(
    unit: Unit,
    units: Sequence[Unit],
    before: Sequence["Future[None]"],
    begun: Mapping[str, "Future[None]"],
    shared: _Shared,
) -> None:
    evaluations = shared.study.evaluations(unit.row)
    report, stopped, call = shared.report, shared.stopped, shared.call
    for future in before:
        future.result()
    first = next((each for each in units if _leads(each, unit)), None)
    state, name = state_of(unit), f"{unit.row.name}, seed {unit.seed}"
    if state.complete(evaluations):
        return
    if state.trained is None:
        if first is not None and state_of(first).diverged:
            trained: dict[str, Any] = {"diverged": f"{first.row.name} diverged"}
        else:
            trained = _train(unit, first, shared)
        state = State(trained)
        _mark(unit, state)
        report(f"{name}: {_summary(trained)}")
    for options in state.missing(evaluations):
        given = shared.statistics.substituted(options) if shared.statistics else options
        if given != options:
            begun["statistics"].result()
        common = [*_device(unit), *_moved(unit), *shared.options, "--json"]
        output = call(["evaluate", str(unit.folder), *given, *common], stopped, unit.folder)
        others = [e for e in state.evaluated if (e[-2:] == LAST) == (options[-2:] == LAST)]
        state = state._replace(  # a record is of one checkpoint
            evaluated=(*others, options), weights=_weights(output)
        )
        _mark(unit, state)
        report(f"{name}: evaluated")


def _summary(trained: dict[str, Any]) -> str:
    if "diverged" in trained:
        return f"diverged: {trained['diverged']}"
    return f"trained in {trained['seconds']:.0f} s"


def _weights(output: str) -> str | None:
    """The SHA-256 of the weights in the record that `jemkit evaluate` printed."""
    record = json.loads(output.splitlines()[-1])
    sha = record.get("subject", {}).get("sha256")
    return sha if isinstance(sha, str) else None


def _device(unit: Unit) -> list[str]:
    """The option for the device of the run's recipe."""
    device = unit.resolved.recipe.run.device
    return [] if device == "auto" else ["--device", device]


def _moved(unit: Unit) -> list[str]:
    """The option for the folder of the data, if it is another one than when the run began."""
    folder = unit.resolved.tables["data"].get("dir")
    before = read_json(unit.folder / "config.json")["recipe"].get("data", {}).get("dir")
    return [] if folder in (None, before) else ["--data-dir", str(folder)]


def _train(unit: Unit, first: Unit | None, shared: _Shared) -> dict[str, Any]:
    """Start or continue the run; returns the last line that the command printed."""
    arguments = ["train", "--out", str(unit.folder), "--json", "--quiet", *shared.options]
    if (unit.folder / "config.json").exists():
        arguments += ["--resume", *_moved(unit)]
    else:
        arguments += ["--config", str(_recipe_file(unit))]
        arguments += ["--init-from", str(first.folder)] if first is not None else []
    try:
        output = shared.call(arguments, shared.stopped, unit.folder)
        line: dict[str, Any] = json.loads(output.splitlines()[-1])
        return line
    except Diverged as error:
        return {"diverged": str(error)}


def _recipe_file(unit: Unit) -> Path:
    """The resolved recipe as a file for --config."""
    folder = unit.folder.parent / "recipes"
    make_folder(folder)
    path = folder / f"{unit.key[:16]}.json"
    write_json(path, {"recipe": unit.resolved.tables})
    return path


def _call(arguments: list[str], stopped: threading.Event, folder: Path) -> str:
    """Run a jemkit command; returns its standard output or raises the error of its exit code."""
    _wait_for_lock(folder, stopped)
    if stopped.is_set():
        raise Preempted("stopped: run the same command again to continue")
    process = subprocess.Popen(
        [sys.executable, "-m", "jemkit", *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    ended = False
    while True:
        try:
            output, errors = process.communicate(timeout=POLL)
            break
        except subprocess.TimeoutExpired:
            if stopped.is_set() and not ended:
                process.terminate()
                ended = True
    if process.returncode == 0:
        return output
    message = errors.strip().splitlines()[-1] if errors.strip() else f"code {process.returncode}"
    message = message.removeprefix("error: ")
    if process.returncode == STOPPED or ended:
        raise Preempted("stopped: run the same command again to continue")
    if process.returncode == Diverged.exit_code:
        raise Diverged(message)
    error = Failed(f"{folder}: {message}")
    error.exit_code = process.returncode if process.returncode > 0 else 1
    raise error


def _wait_for_lock(folder: Path, stopped: threading.Event) -> None:
    """Wait while a process that an earlier command started still works on the run."""
    while (folder / LOCK).exists() and not stopped.is_set():
        try:
            with locked(folder / LOCK, f"continues {folder}"):
                return
        except ConfigError:
            time.sleep(POLL)


def _mark(unit: Unit, state: State) -> None:
    unit.folder.mkdir(parents=True, exist_ok=True)
    write_json(unit.folder / MARK, state._asdict())
