"""No chain is normalised by itself because others did not fill a batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from toys import REGISTRY, gen, toy_recipe, toy_registry

from jemkit import Contrastive, MisfitError, train
from jemkit.attacks.base import Threat
from jemkit.attacks.pixel_model import PixelModel
from jemkit.errors import UsageError
from jemkit.evaluation.sample import sample
from jemkit.metrics.evaluator import Context
from jemkit.models.networks import SmallCNN
from jemkit.sampling.density import LEAST, together
from jemkit.sampling.fresh import TOGETHER
from jemkit.sampling.init_dists import Labelled, Mixture, Start, UniformStart
from jemkit.testing import toy_model, toy_task
from jemkit.testing.toys import toy_backbone

TASK = toy_task()
NORMS = {"batch": True, "none": False, "group": False}


class At:
    """A start that begins at given images."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        return self.x[:n].clone()


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_few_chains_are_those_that_many_would_be(norm: Any) -> None:
    backbone = toy_backbone(TASK, toy_model(TASK, SmallCNN(channels=2, norm=norm)))
    start = At(UniformStart(TASK.shape, TASK.bounds).draw(LEAST, gen(1)))
    drawn: Callable[[int], Tensor] = lambda n: backbone.density.sample(  # noqa: E731
        backbone.model, n, gen(2), steps=4, start=start
    )
    many = drawn(LEAST)
    for n in (1, 2, 7):
        if NORMS[norm]:
            assert torch.equal(drawn(n), many[:n])
    assert together(backbone.density, backbone.model, [1]) == (LEAST if NORMS[norm] else 1)
    assert together(backbone.density, backbone.model, [300, 299]) == 300


def test_by_running_statistics_no_chain_knows_another() -> None:
    backbone = toy_backbone(TASK, density=Contrastive(batch_norm="running_stats"))
    assert together(backbone.density, backbone.model, [1]) == 1


def test_chains_that_are_there_for_batch_norm_are_of_the_same_classes() -> None:
    backbone = toy_backbone(TASK)
    recorded: list[Tensor | None] = []

    class Noting(At):
        def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
            recorded.append(y)
            return super().draw(n, rng, y)

    start: Start = Noting(UniformStart(TASK.shape, TASK.bounds).draw(LEAST, gen()))
    y = torch.tensor([2, 0, 2])
    backbone.density.sample(backbone.model, 3, gen(), steps=1, start=start, y=y)
    (drawn,) = recorded
    assert drawn is not None
    assert drawn.tolist() == [2, 0, 2] * 21 + [2]
    mixture = Mixture().build(TASK, torch.device("cpu"))
    assert len(Labelled(mixture, y).draw(LEAST, gen())) == LEAST


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with batch norm whose buffer has 60 slots, 20 of each class."""
    out = tmp_path_factory.mktemp("together") / "run"
    settings = ["backbone.buffer.conditional=true", "objective.negatives=conditional"]
    recipe = toy_recipe(toy_registry(), "sadajem", "jem", "plain", *settings)
    train(recipe, out, registry=toy_registry())
    return out


def test_the_protocol_of_a_sample_says_how_many_chains_ran_together(run: Path) -> None:
    parts = toy_registry()
    few, one = (sample(run, registry=parts, n=n, steps=2) for n in (10, 1))
    assert few.protocol["together"] == one.protocol["together"] == LEAST
    assert torch.equal(few.pixels[:1], one.pixels)
    many = sample(run, registry=parts, n=TOGETHER + 1, steps=1)
    assert many.protocol["together"] == TOGETHER // 2 + 1


def test_states_of_a_buffer_are_given_once_and_no_more_than_it_has(run: Path) -> None:
    parts = toy_registry()
    whole = sample(run, registry=parts, n=60, source="buffer").pixels
    assert len(whole.flatten(1).unique(dim=0)) == 60
    with pytest.raises(UsageError, match="61 states from a buffer that has 60"):
        sample(run, registry=parts, n=61, source="buffer")
    third = sample(run, registry=parts, n=20, source="buffer", classes=["1"]).pixels
    assert len(third.flatten(1).unique(dim=0)) == 20
    with pytest.raises(UsageError, match="21 states of one class from a buffer that has 20"):
        sample(run, registry=parts, n=21, source="buffer", classes=["1"])
    with pytest.raises(UsageError, match="21 states of one class"):
        sample(run, registry=parts, n=42, source="buffer", classes=["0", "2"])


def test_states_of_a_class_come_from_a_run_that_drew_by_classes_alone(tmp_path: Path) -> None:
    parts = toy_registry()
    recipe = toy_recipe(parts, "sadajem", "jem", "plain", "backbone.buffer.conditional=true")
    train(recipe, tmp_path / "run", registry=parts)
    with pytest.raises(MisfitError, match="the run's chains were unconditional"):
        sample(tmp_path / "run", registry=parts, n=3, source="buffer", classes=["1"])


def test_the_last_of_the_energies_chains_do_not_run_alone() -> None:
    backbone = toy_backbone(TASK)
    subject = PixelModel(backbone.model, TASK.bounds, backbone.density)
    sizes: list[int] = []
    handle = backbone.model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    part = REGISTRY["evaluator"]["energies"](n=131, steps=1)
    result = part._generated(subject, Context(gen(), Threat("Linf", 8.0), batch_size=130))
    handle.remove()
    assert sizes[:2] == [130, LEAST]  # what follows are passes that classify, in eval mode
    assert result.card["together"] == 130
