"""Fresh chains come in even batches, each from its own generator, whoever draws it and when."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from jemkit.errors import Preempted
from jemkit.runtime.rng import generator
from jemkit.runtime.work_cache import ResultCache, Shard
from jemkit.sampling.fresh import TOGETHER, even_batches, in_batches

SIZES = [3, 2, 2]
GENERATORS = partial(generator, torch.device("cpu"), 7, "chains")


@given(n=st.integers(1, 5000), most=st.integers(1, 700))
def test_batches_are_even_and_as_few_as_can_be(n: int, most: int) -> None:
    sizes = even_batches(n, most)
    assert sum(sizes) == n
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-n // most)


@given(n=st.integers(TOGETHER + 1, 20 * TOGETHER))
def test_no_batch_of_a_large_sample_is_small(n: int) -> None:
    assert min(even_batches(n)) >= TOGETHER // 2
    assert sum(even_batches(n)) == n


def test_whole_batches_are_what_they_were() -> None:
    assert even_batches(2500) == [500] * 5
    assert even_batches(100) == [100]


class Drawing:
    """Draws a number a row, and stops where a test wants it to."""

    def __init__(self, *, stop_after: int = 99) -> None:
        self.rows: list[tuple[int, int]] = []
        self.done: list[int] = []
        self.stop_after = stop_after

    def draw(self, rows: slice, rng: Generator) -> dict[str, Tensor]:
        self.rows.append((rows.start, rows.stop))
        x = torch.rand(rows.stop - rows.start, generator=rng)
        return {"x": x, "row": torch.arange(rows.start, rows.stop)}

    def poll(self) -> None:
        if len(self.rows) >= self.stop_after:
            raise Preempted

    def run(self, cache: ResultCache) -> dict[str, Tensor]:
        return in_batches(
            SIZES, self.draw, GENERATORS, cache=cache, poll=self.poll, done=self.done.append
        )


def expected() -> Tensor:
    return torch.cat([torch.rand(n, generator=GENERATORS(i)) for i, n in enumerate(SIZES)])


def test_every_batch_draws_from_a_generator_of_its_own_and_says_how_far_it_is() -> None:
    work = Drawing()
    result = work.run(ResultCache(None, {}))
    assert torch.equal(result["x"], expected())
    assert result["row"].tolist() == [*range(7)]
    assert work.rows == [(0, 3), (3, 5), (5, 7)]
    assert work.done == [3, 5, 7]


def test_a_stop_costs_one_batch_at_most(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        Drawing(stop_after=2).run(ResultCache(tmp_path, {}))
    rest = Drawing()
    assert torch.equal(rest.run(ResultCache(tmp_path, {}))["x"], expected())
    assert rest.rows == [(5, 7)]


def test_processes_draw_what_one_does(tmp_path: Path) -> None:
    second = Drawing(stop_after=1)
    with pytest.raises(Preempted):  # it would wait for the first one's batches
        second.run(ResultCache(tmp_path, {}, Shard(1, 2)))
    first = Drawing()
    assert torch.equal(first.run(ResultCache(tmp_path, {}, Shard(0, 2)))["x"], expected())
    assert (second.rows, first.rows) == ([(3, 5)], [(0, 3), (5, 7)])
