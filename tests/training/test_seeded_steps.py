"""Networks that draw from torch's global generators, as dropout does, train repeatably."""

from functools import partial
from pathlib import Path

import torch
from toys import toy_recipe, toy_registry

from jemkit import Trainer
from jemkit.runtime.run_dir import RunFolder

REGISTRY = toy_registry()


def drawn(out: Path, *overrides: str) -> list[float]:
    """What the network draws from torch's global generator in two steps of a run."""
    recipe = toy_recipe(REGISTRY, "classifier", "ce", "plain", *overrides)
    trainer, values = Trainer(recipe, RunFolder.create(out)), list[float]()
    trainer.backbone.model.register_forward_pre_hook(partial(noted, values))
    before = torch.get_rng_state()
    for _ in range(2):
        trainer.one_step()
    assert torch.equal(torch.get_rng_state(), before)
    return values


def test_the_global_generator_is_the_runs_own_and_its_state_is_put_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = drawn(tmp_path / "a")
    torch.manual_seed(2)
    assert drawn(tmp_path / "b") == first
    assert drawn(tmp_path / "c", "run.seed=7") != first
    assert len(set(first)) == len(first) == 2


def test_a_resumed_run_draws_what_the_whole_one_draws(tmp_path: Path) -> None:
    recipe = toy_recipe(REGISTRY, "classifier", "ce", "plain")

    def begun(name: str, values: list[float]) -> Trainer:
        trainer = Trainer(recipe, RunFolder.create(tmp_path / name))
        hook = partial(noted, values)
        trainer.backbone.model.register_forward_pre_hook(hook)
        return trainer

    whole, first, second = list[float](), list[float](), list[float]()
    trainer = begun("whole", whole)
    for _ in range(4):
        trainer.one_step()
    interrupted = begun("first", first)
    for _ in range(2):
        interrupted.one_step()
    torch.manual_seed(99)
    resumed = begun("second", second)
    resumed.load_state_dict(interrupted.state_dict())
    for _ in range(2):
        resumed.one_step()
    assert first + second == whole


def noted(values: list[float], *_: object) -> None:
    values.append(float(torch.rand(1)))
