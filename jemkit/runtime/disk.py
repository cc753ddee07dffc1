"""Room on a disk: forecast before a run begins; a full one makes it wait, not end."""

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from jemkit.errors import DataError

T = TypeVar("T")

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
TIGHT = 0.8
"""A share of the free room; a run that needs more of it is told so."""
ROW, PICTURE = 1024, 256 * 1024
"""Bytes, with much to spare, of one step's metrics and of one epoch's pictures."""
LEAF = 64
"""Bytes of JSON, about, for one value or tensor's name in a state."""


def state_bytes(tree: Any) -> int:
    """What a state takes on disk: its tensors, and about what its JSON does."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size() + LEAF
    if isinstance(tree, dict):
        return LEAF + sum(map(state_bytes, tree.values()))
    if isinstance(tree, list | tuple):
        return LEAF + sum(map(state_bytes, tree))
    return LEAF


def momenta_bytes(optimizer: Optimizer) -> int:
    """What an optimizer that has not stepped yet is going to remember."""
    if optimizer.state:
        return 0
    total = 0
    for group in optimizer.param_groups:
        copies = len(group["betas"]) if "betas" in group else int(bool(group.get("momentum")))
        total += copies * sum(p.numel() * p.element_size() for p in group["params"])
    return total


def run_bytes(checkpoint: int, *, keep: int, steps: int, epochs: int) -> int:
    """What a run takes: `keep` checkpoints, the best and the one being written; its log, pictures.

    Pictures are one file an epoch.
    """
    return checkpoint * (keep + 2) + steps * ROW + epochs * PICTURE


def free_bytes(folder: Path) -> int:
    """The room on the disk of a folder, which need not exist yet."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def used_bytes(folder: Path) -> int:
    """What the files below a folder take; one that stands under two names is counted once."""
    found = [p.lstat() for p in folder.rglob("*") if p.is_file()]
    return sum({stat.st_ino: stat.st_size for stat in found}.values())


def check_room(
    folder: Path, needed: int, *, free: Callable[[Path], int] = free_bytes
) -> str | None:
    """Refuse a run that cannot fit; a warning where it fits but little is left."""
    there = free(folder)
    if needed > there:
        raise DataError(
            f"{folder} needs {readable(needed)} and its disk has {readable(there)} free: make "
            "room, choose another --out, or lower run.keep or backbone.buffer.capacity"
        )
    if needed > TIGHT * there:
        return f"{folder} needs {readable(needed)} of the {readable(there)} that its disk has free"
    return None


def readable(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@dataclass(frozen=True)
class Patience:
    """What to do while a disk is full: say so once, look again, give up when a stop is asked."""

    stop: Callable[[], bool]
    tell: Callable[[str], None] = log.warning
    sleep: Callable[[float], None] = time.sleep
    every: float = 2.0  # seconds

    def wait(self, path: Path, waited: int) -> None:
        if not waited:
            self.tell(f"the disk of {path} is full: waiting until there is room, or for a stop")
        if self.stop():
            raise DataError(
                f"the disk of {path} is full and a stop was asked for: this file is not written; "
                "what was saved before it is whole. Make room, then go on with --resume"
            )
        self.sleep(self.every)


_patience: ContextVar[Patience | None] = ContextVar("patience", default=None)


@contextmanager
def waiting(patience: Patience) -> Iterator[None]:
    """Inside the block a write that finds its disk full waits for room; outside it raises."""
    token = _patience.set(patience)
    try:
        yield
    finally:
        _patience.reset(token)


def until_room(path: Path, write: Callable[[], T]) -> T:
    """What `write` gives back; begun again, where the disk was full, as often as it takes.

    It must leave nothing behind when it fails.
    """
    waited = 0
    while True:
        try:
            done = write()
        except OSError as error:
            patience = _patience.get()
            if patience is None or error.errno not in FULL:
                raise
            patience.wait(path, waited)
            waited += 1
        else:
            if waited and (patience := _patience.get()) is not None:
                patience.tell(f"there is room again: {path.name} is written")
            return done
