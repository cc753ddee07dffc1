"""Generators of their own, and recipes that a person could run."""

import itertools
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jemkit import PGD, ConfigError, Options
from jemkit.config.recipe import resolve
from jemkit.config.registry import installed
from jemkit.data import Augmentation, Images
from jemkit.runtime.rng import generator
from jemkit.splits import Splits, shuffled_by_class
from jemkit.training.build import build_run
from jemkit.training.validation import Validator

REGISTRY = installed(third_party=False)
CPU = torch.device("cpu")
TINY = ["run.max_train=60", "run.batch_size=8", "backbone.buffer.capacity=16"]


@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 500)), min_size=2, unique=True))
def test_no_two_words_share_a_stream(words: list[tuple[int, int]]) -> None:
    draws = {
        float(torch.rand((), generator=generator(CPU, *pair), dtype=torch.float64))
        for pair in words
    }
    assert len(draws) == len(words)


def test_data_and_chains_and_exams_draw_apart() -> None:
    parts = build_run(resolve(REGISTRY, overrides=TINY).recipe)
    fresh = build_run(resolve(REGISTRY, overrides=[*TINY, "run.seed=1"]).recipe)
    exams = [
        Validator(parts.backbone, parts.task, parts.splits, seed, epoch)._generator(name)
        for seed, epoch, name in itertools.product((0, 1), (1, 2), ("validate", "grid"))
    ]
    streams = [parts.loader.rng, fresh.loader.rng, generator(CPU, 0, "chains"), *exams]
    assert len({float(torch.rand((), generator=rng)) for rng in streams}) == len(streams)


@given(counts=st.lists(st.integers(30, 60), min_size=2, max_size=5))
def test_every_beginning_of_the_order_has_every_class_in_proportion(counts: list[int]) -> None:
    y = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])  # sorted, as folders list it
    order = shuffled_by_class(y, len(counts))
    assert sorted(order.tolist()) == list(range(len(y)))
    for end in (10, len(y) // 2):
        share = torch.bincount(y[order[:end]], minlength=len(counts)) / end
        wanted = torch.tensor(counts) / len(y)
        assert (share - wanted).abs().max() <= 1 / end + 1e-6


class Sorted(Options):
    """Images class by class, as a folder lists them."""

    radius_px: ClassVar[float] = 8
    augmentation: ClassVar[Augmentation] = Augmentation()

    @property
    def n_classes(self) -> int:
        return 10

    def load(self, split: str) -> Images:
        return Images(torch.zeros(1000, 1, 8, 8), torch.arange(1000) // 100)


def test_validation_begins_with_every_class() -> None:
    valid = Splits(Sorted()).images("valid")
    assert len(valid.y) == 100
    assert len(valid.y[:10].unique()) == 10


@pytest.mark.parametrize("px", [0.031, 8 / 255, 0.99])
def test_a_radius_that_is_probably_a_fraction_is_refused(px: float) -> None:
    with pytest.raises(ValueError, match="probably a fraction: write"):
        PGD(radius_px=px)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["backbone.buffer.capacity=4"], "starts 8 chains, but the buffer has 4"),
        (["objective.use=jem", "objective.negatives=conditional"], "buffer.conditional = true"),
        (["backbone.buffer.conditional=true", "backbone.buffer.capacity=16"], "multiple of 10"),
    ],
)
def test_a_buffer_that_does_not_do_is_refused_before_the_first_step(
    settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_run(resolve(REGISTRY, overrides=[*TINY, *settings]).recipe)


COMBINATIONS = list(
    itertools.product(REGISTRY["backbone"], REGISTRY["objective"], REGISTRY["updater"])
)


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar100", "svhn"])
def test_every_combination_resolves_to_a_rate_that_its_optimizer_bears(dataset: str) -> None:
    for backbone, objective, updater in COMBINATIONS:
        tables = {"data": dataset, "backbone": backbone, "objective": objective, "updater": updater}
        named = {table: {"use": name} for table, name in tables.items()}
        optimizer = resolve(REGISTRY, named=named).recipe.optimizer
        assert optimizer.lr <= (0.1 if optimizer.use == "sgd" else 1e-3), (backbone, objective)


@pytest.mark.parametrize("preset", ["paper", "v3", "released", "released-ce"])
def test_a_preset_means_the_same_objective_on_every_data_set(preset: str) -> None:
    def objective(dataset: str) -> object:
        return resolve(REGISTRY, preset=preset, named={"data": {"use": dataset}}).recipe.objective

    assert objective("digits") == objective("cifar10") == objective("svhn")


@pytest.mark.parametrize(
    ("backbone", "epochs"), [("jem", 200), ("jempp", 150), ("sadajem", 200), ("mebm", 200)]
)
def test_the_papers_lengths_hold_on_cifar(backbone: str, epochs: int) -> None:
    def run_of(objective: str) -> int:
        named = {"data": {"use": "cifar10"}, "backbone": {"use": backbone}}
        return resolve(REGISTRY, named={**named, "objective": {"use": objective}}).recipe.run.epochs

    assert run_of("jem") == epochs
    assert run_of("ebjdat") == 100
