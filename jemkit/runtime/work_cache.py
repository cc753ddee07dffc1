"""Cached parts of unfinished work, so that a killed run repeats at most one of them."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jemkit.errors import DataError
from jemkit.runtime.files import load_tensors, write_tensors
from jemkit.runtime.opening import make_folder, refuse_link

Piece = dict[str, Tensor]

SEAL = "sha256"
"""A part's own hash among its tensors, since safetensors would not detect a flipped bit."""


class Shard(NamedTuple):
    """Which parts a process computes."""

    rank: int = 0
    size: int = 1

    def owns(self, piece: int) -> bool:
        return piece % self.size == self.rank


WHOLE = Shard()


class ResultCache:
    """Parts in a folder whose name is a hash of everything they depend on.

    Without a `work` folder they are kept in memory, and other processes cannot read them.
    """

    def __init__(self, work: Path | None, about: dict[str, Any], shard: Shard = WHOLE) -> None:
        self.shard = WHOLE if work is None else shard
        self.folder: Path | None = None
        self._pieces: dict[str, Piece] = {}
        if work is None:
            return
        text = json.dumps(about, sort_keys=True, default=str)
        self.folder = work / hashlib.sha256(text.encode()).hexdigest()[:16]
        _make(self.folder)

    def pieces(
        self,
        names: list[str],
        compute: Callable[[int], Piece],
        poll: Callable[[], None],
        done: Callable[[int], None],
    ) -> Iterator[Piece]:
        """Every part, in order: read, computed here, or waited for if another process computes it.

        `compute(i)` returns part i; `done(n)` is called with the number of complete parts. They
        come one by one, so that only one of them is in memory.
        """
        for i, name in enumerate(names):
            if self.shard.owns(i) and not self._has(name):
                poll()
                self._write(name, compute(i))
            done(i + 1)
        for i, name in enumerate(names):
            while (piece := self._read(name)) is None:
                poll()
                if self.folder is not None and not self.folder.exists():
                    piece = compute(i)  # another process did the same, and removed it at its end
                    break
                if self.shard.owns(i):
                    self._write(name, compute(i))
                else:
                    time.sleep(0.05)
            yield piece

    def remove(self) -> None:
        """Delete every part, on rank 0, since others may still read; an empty `work`, too."""
        self._pieces.clear()
        if self.folder is not None and self.shard.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # other work is in progress there
                self.folder.parent.rmdir()

    def _has(self, name: str) -> bool:
        return name in self._pieces if self.folder is None else _path(self.folder, name).exists()

    def _write(self, name: str, piece: Piece) -> None:
        if self.folder is None:
            self._pieces[name] = piece
        else:
            _make(self.folder)
            write_tensors(_path(self.folder, name), {**piece, SEAL: _seal(piece)})

    def _read(self, name: str) -> Piece | None:
        """A part, or None if it is not there yet."""
        if self.folder is None:
            return self._pieces.get(name)
        path = _path(self.folder, name)
        if not path.exists():
            return None
        try:
            piece = load_tensors(path)
            if not torch.equal(piece.pop(SEAL, torch.empty(0)), _seal(piece)):
                raise DataError("it does not contain what was written")
        except DataError:
            if not path.exists():
                return None
            path.unlink(missing_ok=True)
            raise DataError(
                f"{path} was damaged and is removed; the same command computes it again"
            ) from None
        return piece


def _make(folder: Path) -> None:
    """Create a folder in `work`, which another process may be removing at this moment."""
    refuse_link(folder.parent)
    try:
        make_folder(folder)
    except FileNotFoundError:
        make_folder(folder)


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _seal(piece: Piece) -> Tensor:
    return torch.tensor(list(bytes.fromhex(tensors_hash(piece))), dtype=torch.uint8)
