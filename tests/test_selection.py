"""A part of the images stands for the whole: every class has its share, whatever the order."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import REGISTRY

import jemkit as api
from jemkit import ConfigError, Images
from jemkit.config.recipe import resolve
from jemkit.selection import missing, missing_classes_warning, part_of, stratified
from jemkit.training.build import build_run
from jemkit.training.validation import Validator, images_to_judge


def images(y: torch.Tensor) -> Images:
    return Images(torch.zeros(len(y), 1, 8, 8), y)


counts = st.lists(st.integers(1, 40), min_size=2, max_size=6)


@given(counts=counts, share=st.floats(0.05, 1))
def test_a_part_holds_every_class_in_proportion_and_keeps_the_order(
    counts: list[int], share: float
) -> None:
    y = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])  # as folders list it
    n = max(1, int(share * len(y)))
    index = stratified(y, n)
    assert len(index) == n
    assert index.tolist() == sorted(set(index.tolist()))
    wanted = torch.tensor(counts) / len(y) * n
    assert ((torch.bincount(y[index], minlength=len(counts)) - wanted).abs() <= 1.5).all()


@given(counts=counts, seed=st.integers(0, 99))
def test_the_share_of_a_class_does_not_hang_on_where_it_lies(counts: list[int], seed: int) -> None:
    y = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    mixed = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    n = (len(y) + 1) // 2
    for label in range(len(counts)):
        one, two = (int((some[stratified(some, n)] == label).sum()) for some in (y, mixed))
        assert abs(one - two) <= 1


def test_a_protocol_says_how_a_part_was_chosen_and_first_n_has_its_name() -> None:
    whole = images(torch.arange(900) // 300)
    part = part_of(whole, 100)
    assert part.text == "100 of 900, stratified by class, seed 0"
    assert torch.bincount(part.images.y).tolist() in ([33, 33, 34], [33, 34, 33], [34, 33, 33])
    first = part_of(whole, 100, "first")
    assert first.text == "the first 100 of 900"
    assert first.images.y.unique().tolist() == [0]
    assert part_of(whole, 900).text == part_of(whole, 1000, "first").text == "all"


def test_the_first_images_alone_are_no_way_to_take_all() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    requested = {"registry": REGISTRY, "only": "accuracy", "selection": "first"}
    with pytest.raises(ConfigError, match="set --max-images"):
        api.evaluate(model, images(torch.arange(9) % 3), **requested)  # type: ignore[arg-type]
    record = api.evaluate(model, images(torch.arange(9) % 3), max_images=4, **requested)  # type: ignore[arg-type]
    assert record.protocol["selection"] == "the first 4 of 9"


@given(labels=st.lists(st.integers(0, 5), min_size=1), more=st.integers(0, 20))
def test_classes_without_an_image_are_named(labels: list[int], more: int) -> None:
    y, classes = torch.tensor(labels), 6 + more
    assert missing(y, classes) == [k for k in range(classes) if k not in labels]
    messages = missing_classes_warning(y, classes)
    assert (messages is None) == (not missing(y, classes))


def ran(total_steps: int, chain: int | None = None, requested: int | None = None) -> int:
    """Test images that a run judges at its end."""
    density = None if chain is None else SimpleNamespace(steps=chain)
    parts = SimpleNamespace(
        backbone=SimpleNamespace(density_or_none=density),
        loader=SimpleNamespace(batch_size=100),
        task=SimpleNamespace(total_steps=total_steps),
    )
    return images_to_judge(parts, requested)  # type: ignore[arg-type]


def test_the_last_judgement_takes_a_tenth_of_the_passes_of_training_and_at_least_1000_images() -> (
    None
):
    assert ran(10) == 1000
    assert ran(22_000) == 22_000 * 100 * 2 // 440 == 10_000
    assert ran(2_000, chain=10) == 2_000 * 100 * 22 // 440 == 10_000
    assert ran(10, requested=7) == 7
    assert ran(10**6, chain=20, requested=7) == 7


def test_a_run_judges_as_many_test_images_as_its_recipe_says_by_class() -> None:
    few = ["run.epochs=1", "run.max_train=60", "run.batch_size=20", "run.eval_images=4"]
    few += ["run.test_images=30", "backbone.use=classifier", "objective.use=ce"]
    parts = build_run(resolve(REGISTRY, overrides=few).recipe)
    validator = Validator(parts.backbone, parts.task, parts.splits, 0, 0)
    result = validator.judge({}, 30)
    assert {figure.n for figure in result.figures} == {30}
    assert result.protocol["selection"] == "30 of 500, stratified by class, seed 0"
    assert not result.protocol["standard"]
