"""Checkpoints: a folder of safetensors and JSON, whose manifest of hashes is written last."""

import os
import shutil
from collections.abc import Callable
from concurrent import futures
from contextvars import copy_context
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from jemkit.errors import DataError, memory_ran_out
from jemkit.runtime.disk import until_room
from jemkit.runtime.files import (
    file_hash,
    load_tensors,
    new_folder,
    read_json,
    write_json,
    write_tensors,
)
from jemkit.runtime.pytree import Snapshot, packed, unpacked

FORMAT = 1
MODEL, TENSORS = "model.safetensors", "state.safetensors"
TREE, MANIFEST = "state.json", "manifest.json"
FILES = (MODEL, TENSORS, TREE)
State = dict[str, Any]
EARLIER = "--resume uses an earlier one automatically, sample and evaluate with --checkpoint last"


def save(path: Path, state: State, *, best: Path | None = None) -> str:
    """Write `state` as the folder `path`, whole or not at all; returns the SHA-256 of the model.

    `state["model"]` is a state dict; the rest may be any tree of dicts, lists, tensors and plain
    values, with strings or integers as keys. `best` gets the same files, and gets them first: a run
    must never resume from a checkpoint that claims to be the best but was not saved as the best.
    """
    tensors: dict[str, Tensor] = {}
    with new_folder(path) as work:
        hashes = {MODEL: write_tensors(work / MODEL, state["model"])}
        rest = {name: value for name, value in state.items() if name != "model"}
        tree = packed(rest, "", tensors)
        hashes[TENSORS] = write_tensors(work / TENSORS, tensors)
        hashes[TREE] = write_json(work / TREE, {"format": FORMAT, "tree": tree})
        write_json(work / MANIFEST, {"format": FORMAT, "sha256": hashes})
        if best is not None:
            until_room(best, lambda: _link(work, best))
    return hashes[MODEL]


def _link(source: Path, path: Path) -> None:
    """Store the same files as the folder `path`, by hard links if the disk supports them."""
    with new_folder(path) as work:
        for name in (*FILES, MANIFEST):
            try:
                os.link(source / name, work / name)
            except OSError:
                shutil.copyfile(source / name, work / name)


def load(path: Path) -> State:
    """The state that `save` wrote; DataError if a file is missing, damaged or another's."""
    verify(path)
    saved = read_json(path / TREE)
    tensors, model = load_tensors(path / TENSORS), load_tensors(path / MODEL)
    try:
        return {**unpacked(saved["tree"], tensors), "model": model}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{path / TREE} is not a state of a run: {what}") from None


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, a run's newest one, or a safetensors file."""
    if path.exists() and not path.is_dir():
        return load_tensors(path)
    folder = path if (path / MANIFEST).exists() else newest(path / "checkpoints")
    if folder is None:
        raise DataError(
            f"{path} is not a checkpoint, a run with checkpoints, an exported or imported model or "
            "a safetensors file"
        )
    verify(folder)
    return load_tensors(folder / MODEL)


def verify(path: Path) -> dict[str, str]:
    """Check every file against the manifest; returns the hashes."""
    if not path.is_dir():
        raise DataError(f"{path} is not a checkpoint folder: it is missing or a single file")
    manifest = read_json(path / MANIFEST)
    hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(hashes, dict) or set(hashes) != set(FILES):
        raise DataError(f"{path / MANIFEST} is not a manifest of jemkit")
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{path} has checkpoint format {manifest.get('format')!r}; this jemkit reads {FORMAT}"
        )
    for name, wanted in hashes.items():
        if not (path / name).exists():
            raise DataError(f"{path / name} is missing; {EARLIER}")
        if file_hash(path / name) != wanted:
            fault = f"{path / name} is damaged: its SHA-256 is not the manifest's"
            raise DataError(f"{fault}; {EARLIER}")
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

    `save` copies the state to the host and returns. A thread writes the files; its error is raised
    by the next `save` or `wait`, once. Call `wait` last.
    """

    def __init__(self) -> None:
        # its thread is not a daemon, so that the interpreter waits for it at exit
        self._thread, self._snapshot = futures.ThreadPoolExecutor(1), Snapshot()
        self._writing: futures.Future[None] | None = None

    def save(
        self, path: Path, state: State, *, best: Path | None = None,
        then: Callable[[], object] = bool,
    ) -> None:  # fmt: skip
        """As `checkpoint.save`, after the previous one is written; `then` is called after it."""
        self.wait()
        copied = self._snapshot.of(state)

        def write() -> None:
            save(path, copied, best=best)
            then()

        self._writing = self._thread.submit(copy_context().run, write)

    def ready(self, state: State) -> None:
        """Allocate the memory for copies of such a state, so that no step has to."""
        self._snapshot.of(state)

    def wait(self) -> None:
        """Wait until everything is written; raises any error of the thread."""
        if self._writing is not None:
            futures.wait([self._writing])
            written, self._writing = self._writing, None
            written.result()
