"""Checkpoints: a folder of safetensors and JSON, whose manifest of hashes is written last."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from torch import Tensor

from jemkit.errors import DataError, memory_ran_out
from jemkit.runtime.disk import until_room
from jemkit.runtime.files import (
    file_hash,
    load_tensors,
    read_json,
    set_aside,
    sync_folder,
    write_json,
    write_tensors,
)
from jemkit.runtime.pytree import Snapshot, differing, packed, same, unpacked

__all__ = [
    "FILES", "FORMAT", "MANIFEST", "MODEL", "Sound", "Writer", "complete", "differing",
    "file_hash", "load", "load_weights", "newest", "prune", "recover", "remove", "same", "save",
    "set_aside", "sound", "verify",
]  # fmt: skip


FORMAT = 1
MODEL, TENSORS = "model.safetensors", "state.safetensors"
TREE, MANIFEST = "state.json", "manifest.json"
FILES = (MODEL, TENSORS, TREE)
State = dict[str, Any]
EARLIER = "--resume uses an earlier one automatically, sample and evaluate with --checkpoint last"
MIGRATIONS: dict[int, Callable[[State], State]] = {}
"""Functions that convert a state from one format to the next."""


def save(path: Path, state: State, *, best: Path | None = None) -> str:
    """Write `state` as the folder `path`, whole or not at all; returns the SHA-256 of the model.

    `state["model"]` is a state dict; the rest may be any tree of dicts, lists, tensors and plain
    values, with strings or integers as keys. `best` gets the same files, and gets them first: a run
    must never resume from a checkpoint that claims to be the best but was not saved as the best.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = until_room(path, lambda: _work(path))
    try:
        hashes = {MODEL: write_tensors(work / MODEL, state["model"])}
        tensors: dict[str, Tensor] = {}
        rest = {name: value for name, value in state.items() if name != "model"}
        tree = packed(rest, "", tensors)
        hashes[TENSORS] = write_tensors(work / TENSORS, tensors)
        hashes[TREE] = write_json(work / TREE, {"format": FORMAT, "tree": tree})
        write_json(work / MANIFEST, {"format": FORMAT, "sha256": hashes})
        os.chmod(work, 0o755)
        if best is not None:
            until_room(best, lambda: _twin(work, best))
        until_room(path, lambda: _put(work, path))
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return hashes[MODEL]


def _work(path: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))


def _twin(work: Path, path: Path) -> None:
    """Store the same files as the folder `path`, by hard links if the disk supports them."""
    twin = _work(path)
    try:
        for name in (*FILES, MANIFEST):
            try:
                os.link(work / name, twin / name)
            except OSError:
                shutil.copyfile(work / name, twin / name)
        os.chmod(twin, 0o755)
        sync_folder(twin)
        _put(twin, path)
    except BaseException:
        shutil.rmtree(twin, ignore_errors=True)
        raise


def _put(work: Path, path: Path) -> None:
    """Rename `work` to `path`; the previous folder is deleted last, or restored on an error.

    After a kill between the two renames it is under its other name, where `recover` finds it.
    """
    aside = work.with_name(f"{work.name}.old")
    if path.exists():
        os.replace(path, aside)
    try:
        os.replace(work, path)
    except BaseException:
        if aside.exists():
            os.replace(aside, path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def load(path: Path) -> State:
    """The state that `save` wrote; DataError if a file is missing, damaged or not a
    checkpoint's."""
    verify(path)
    saved = read_json(path / TREE)
    tensors, model = load_tensors(path / TENSORS), load_tensors(path / MODEL)
    try:
        written = saved["format"]
        state = {**unpacked(saved["tree"], tensors), "model": model}
        for older in range(written, FORMAT):
            state = MIGRATIONS[older](state)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path / TREE} is not a state of a run: {type(error).__name__}: {error}"
        ) from None
    return state


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint folder, of a run's newest checkpoint, of an exported or imported
    model, or of a safetensors file."""
    if path.exists() and not path.is_dir():
        return load_tensors(path)
    folder = path if (path / MANIFEST).exists() else newest(path / "checkpoints")
    if folder is not None:
        verify(folder)
        return load_tensors(folder / MODEL)
    if not (path / MODEL).is_file():
        raise DataError(
            f"{path} is not a checkpoint, a run with checkpoints, an exported or imported model "
            f"or a safetensors file"
        )
    config = read_json(path / "config.json")
    hashes = config.get("sha256") if isinstance(config, dict) else None
    wanted = hashes.get(MODEL) if isinstance(hashes, dict) else None
    if file_hash(path / MODEL) != wanted:
        raise DataError(
            f"{path / MODEL} is damaged: its SHA-256 is not the {wanted} of config.json"
        )
    return load_tensors(path / MODEL)


def verify(path: Path) -> dict[str, str]:
    """Check every file against the manifest; returns the hashes."""
    if not path.is_dir():
        raise DataError(f"{path} is not a checkpoint folder: it is missing or a single file")
    manifest = read_json(path / MANIFEST)
    hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(hashes, dict) or set(hashes) != set(FILES):
        raise DataError(f"{path / MANIFEST} is not a manifest of jemkit")
    if manifest.get("format") not in (FORMAT, *MIGRATIONS):
        raise DataError(
            f"{path} has checkpoint format {manifest.get('format')!r}; this jemkit reads "
            f"{', '.join(map(str, sorted({FORMAT, *MIGRATIONS})))}"
        )
    for name, wanted in hashes.items():
        if not (path / name).exists():
            raise DataError(f"{path / name} is missing; {EARLIER}")
        if file_hash(path / name) != wanted:
            raise DataError(
                f"{path / name} is damaged: its SHA-256 is not the manifest's; {EARLIER}"
            )
    return dict(hashes)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint `step-N` of a folder."""
    return max(complete(folder), default=None)


class Sound(NamedTuple):
    """The newest readable checkpoint, and the newer ones that cannot be read."""

    path: Path
    state: State
    damaged: dict[Path, DataError]  # newer ones, with the reason


def sound(folder: Path) -> Sound:
    """Read the newest checkpoint that verifies; DataError if there is none."""
    damaged: dict[Path, DataError] = {}
    for path in reversed(complete(folder)):
        try:
            return Sound(path, load(path), damaged)
        except DataError as error:
            if memory_ran_out(error):  # the file may be intact
                raise
            damaged[path] = error
    if damaged:
        reasons = "; ".join(map(str, damaged.values()))
        raise DataError(f"no checkpoint in {folder} can be read: {reasons}")
    raise DataError(f"{folder.parent} contains no complete checkpoint to resume from")


def recover(folder: Path) -> None:
    """Restore what a kill between two renames left under another name."""
    for aside in sorted(folder.glob(".*.old")):
        path = folder / aside.name[1:].split(".")[0]
        if not path.exists() and (aside / MANIFEST).exists():
            os.replace(aside, path)


def prune(folder: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints; remove leftovers of interrupted writes."""
    recover(folder)
    for old in complete(folder)[:-keep]:
        remove(old)
    for orphan in [*folder.glob(".step-*"), *folder.glob(".best.*")]:
        shutil.rmtree(orphan, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a checkpoint; if killed half-way, the rest is not mistaken for a damaged one."""
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / MANIFEST).exists())


class Writer:
    """Writes checkpoints in a background thread, one at a time and in order.

    `save` copies the state to the host and returns. A thread writes the files; its errors are
    raised by the next `save` or `wait`. Call `wait` last.
    """

    def __init__(self) -> None:
        self._behind, self._snapshot = BackgroundWriter(), Snapshot()

    def save(
        self, path: Path, state: State, *, best: Path | None = None,
        then: Callable[[], object] = bool,
    ) -> None:  # fmt: skip
        """As `checkpoint.save`, after the previous one is written; `then` is called after it."""
        self.wait()
        copied = self._snapshot.of(state)
        self._behind.start(lambda: (save(path, copied, best=best), then()))

    def ready(self, state: State) -> None:
        """Allocate the memory for copies of such a state, so that no step has to."""
        self._snapshot.of(state)

    def wait(self) -> None:
        """Wait until everything is written; raises any error of the thread."""
        self._behind.wait()


class BackgroundWriter:
    """One thread for one task; its error is raised by the next `wait`, once."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._failed: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Start `work`; the previous work must be finished: call `wait` first."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failed = error

        # Not a daemon, so that the interpreter waits for it at exit; with this thread's context.
        self._thread = Thread(target=copy_context().run, args=(run,), name="behind")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the work is done; raises its error, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
