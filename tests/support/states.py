"""States of runs and checkpoints, as tests compare them."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import Tensor
from toys import gen

from jemkit import Trainer
from jemkit.config.recipe import Resolved
from jemkit.runtime.run_dir import RunFolder
from jemkit.testing import toy_model, toy_task


def timeless(state: dict[str, Any]) -> dict[str, Any]:
    """A state without what the clock wrote."""
    history = [{k: v for k, v in e.items() if k != "seconds"} for e in state["history"]]
    return {**state, "seconds": 0, "history": history}


TASK = toy_task()


class Course(NamedTuple):
    """States of one run, uninterrupted and resumed."""

    began: dict[str, Any]
    cut: dict[str, Any]  # after two steps
    ended: dict[str, Any]  # after four
    resumed: dict[str, Any]  # from `cut`, after four


def cut_and_resumed(resolved: Resolved, folder: Path) -> Course:
    """Train four steps, and again with an interruption after two."""
    whole = Trainer(resolved, RunFolder.create(folder / "whole"))
    began = deepcopy(whole.state_dict())
    whole.run(until=4)
    first = Trainer(resolved, RunFolder.create(folder / "cut"))
    first.run(until=2)
    second = Trainer(resolved, RunFolder.create(folder / "other"))
    second.load_state_dict(first.state_dict())
    second.run(until=4)
    return Course(began, first.state_dict(), whole.state_dict(), second.state_dict())


def state(seed: int = 0) -> dict[str, object]:
    model = toy_model(TASK, seed=seed)
    optimizer = torch.optim.Adam(model.parameters())
    model(normal(seed, 3, *TASK.shape)).energy.mean().backward()
    optimizer.step()
    return {
        "model": {n: t.detach().clone() for n, t in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "rng": gen(seed).get_state(),
        "history": [{"epoch": 1, "accuracy": 0.1 + 0.2}],
        "nothing": None,
        "flags": (True, 2, "three", -0.0, 1e-300),
    }


tensors = st.builds(
    lambda seed, shape, dtype: normal(seed, *shape, scale=100).to(dtype),
    seeds,
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8]),
)


def nodes(total: Tensor) -> int:
    """How many nodes a backward pass would visit."""

    def walk(visited: set[object], node: object) -> Iterator[object]:
        if node is None or node in visited:
            return
        visited.add(node)
        for child, _ in node.next_functions:
            yield from walk(visited, child)

    visited: set[object] = set()
    list(walk(visited, total.grad_fn))
    return len(visited)
