"""Fresh chains in batches, each kept once it is drawn, so that a stop costs one at most."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Generator

from jemkit.runtime.microbatch import retry_on_oom
from jemkit.runtime.work_cache import Piece, ResultCache

TOGETHER = 500  # chains at the most, where images are drawn to be looked at or judged


def even_batches(n: int, most: int = TOGETHER) -> list[int]:
    """n chains in as few batches of at most `most` as it takes, none smaller by more than one.

    A small last batch would be normalised by its own statistics.
    """
    batches = -(-n // most)
    return [n // batches + (i < n % batches) for i in range(batches)]


def in_batches(
    sizes: list[int],
    draw: Callable[[slice, Generator], Piece],
    generators: Callable[[int], Generator],
    *,
    cache: ResultCache,
    poll: Callable[[], None],
    done: Callable[[int], None],
) -> Piece:
    """What `draw` gives of the rows of each batch, put together by name.

    Batch i draws from `generators(i)`, so that its chains do not depend on the others having run
    here; `done` hears how many rows are complete.
    """
    ends = [0, *accumulate(sizes)]

    def compute(i: int) -> Piece:
        rng = generators(i)
        return retry_on_oom(lambda: draw(slice(ends[i], ends[i + 1]), rng), rng)

    names = [f"{i:05d}-{size}" for i, size in enumerate(sizes)]
    pieces = list(cache.pieces(names, compute, poll, lambda batches: done(ends[batches])))
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
