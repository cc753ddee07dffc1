"""Disk space: estimated before a run begins; if the disk is full, the run waits."""

import errno
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jemkit.errors import DataError

if TYPE_CHECKING:
    from torch.optim import Optimizer

T = TypeVar("T")

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
TIGHT = 0.8
"""The share of the free space above which a run's size causes a warning."""
ROW, PICTURE = 1024, 256 * 1024
"""Bytes of one step's metrics and of one epoch's pictures, generously estimated."""
LEAF = 64
"""Approximate bytes of JSON for one value or tensor name in a state."""


def state_bytes(tree: Any) -> int:
    """The size of a state on disk: its tensors, and approximately its JSON."""
    from torch import Tensor  # `jemkit ls` measures folders without it

    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size() + LEAF
    if isinstance(tree, dict):
        return LEAF + sum(map(state_bytes, tree.values()))
    if isinstance(tree, list | tuple):
        return LEAF + sum(map(state_bytes, tree))
    return LEAF


def momenta_bytes(optimizer: "Optimizer") -> int:
    """The state that an optimizer will have after its first step."""
    if optimizer.state:
        return 0
    total = 0
    for group in optimizer.param_groups:
        copies = len(group["betas"]) if "betas" in group else int(bool(group.get("momentum")))
        total += copies * sum(p.numel() * p.element_size() for p in group["params"])
    return total


def run_bytes(checkpoint: int, *, keep: int, steps: int, epochs: int) -> int:
    """The size of a run: `keep` checkpoints, the best, the one being written, log, pictures."""
    return checkpoint * (keep + 2) + steps * ROW + epochs * PICTURE


def free_bytes(folder: Path) -> int:
    """The free space on the disk of a folder, which need not exist yet."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def used_bytes(folder: Path) -> int:
    """The size of the files below a folder; a file with two names is counted once."""
    sizes = {}
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a run that is training renames and prunes
                status = os.lstat(os.path.join(root, name))
                if stat.S_ISREG(status.st_mode):
                    sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def check_room(
    folder: Path, needed: int, *, free: Callable[[Path], int] = free_bytes
) -> str | None:
    """Reject a run that does not fit; warn if it fits but little space is left."""
    there = free(folder)
    if needed > there:
        raise DataError(
            f"{folder} needs {readable(needed)} but its disk has {readable(there)} free: free some "
            "space, choose another --out, or lower run.keep or backbone.buffer.capacity"
        )
    if needed > TIGHT * there:
        return f"{folder} needs {readable(needed)} of the {readable(there)} that its disk has free"
    return None


def readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@dataclass(frozen=True)
class Patience:
    """What to do while a disk is full: warn once, check again, give up if a stop was requested."""

    stop: Callable[[], bool]
    warn: Callable[[str], None] = log.warning
    sleep: Callable[[float], None] = time.sleep
    every: float = 2.0  # seconds

    def wait(self, path: Path, waited: int) -> None:
        if not waited:
            self.warn(f"the disk of {path} is full: waiting for free space, or for a stop signal")
        if self.stop():
            raise DataError(
                f"the disk of {path} is full and a stop was requested: this file is not written; "
                "everything saved before it is intact. Free some space, then continue with --resume"
            )
        self.sleep(self.every)


_patience: ContextVar[Patience | None] = ContextVar("patience", default=None)


@contextmanager
def waiting(patience: Patience) -> Iterator[None]:
    """Inside the block a write to a full disk waits for space; outside it raises."""
    token = _patience.set(patience)
    try:
        yield
    finally:
        _patience.reset(token)


def until_room(path: Path, write: Callable[[], T]) -> T:
    """The result of `write`, which is repeated as often as the disk was full.

    It must leave nothing behind if it fails.
    """
    patience, waited = _patience.get(), 0
    while True:
        try:
            done = write()
        except OSError as error:
            if patience is None or error.errno not in FULL:
                raise
            patience.wait(path, waited)
            waited += 1
            continue
        if waited and patience is not None:
            patience.warn(f"there is free space again: {path.name} is written")
        return done
