"""The epoch whose weights are evaluated is the best on the validation split."""

from pathlib import Path

import pytest
from toys import toy_recipe, toy_registry

from jemkit import train
from jemkit.config.recipe import resolve
from jemkit.training.compatibility import trained_threat
from jemkit.training.validation import Validator

REGISTRY = toy_registry()
CHOICES = [
    ([0.3, 0.9, 0.6], [0.3, 0.1, 0.2], 2, 1),
    ([0.9, 0.9, 0.9], [0.1, 0.2, 0.1], 2, 2),
    ([0.1, 0.3, 0.3], [0.2, 0.1, 0.1], 3, 1),
    ([0.5, 0.5, 0.5], [0.1, 0.1, 0.1], 3, 3),
]


@pytest.mark.parametrize(("accuracy", "pgd10", "by_accuracy", "by_pgd10"), CHOICES)
def test_the_best_epoch_is_selected_by_the_accuracy_that_the_recipe_names(
    accuracy: list[float], pgd10: list[float], by_accuracy: int, by_pgd10: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for select, best in (("accuracy", by_accuracy), ("pgd10", by_pgd10)):
        measured = iter([{"accuracy": a, "pgd10": r} for a, r in zip(accuracy, pgd10, strict=True)])
        monkeypatch.setattr(Validator, "validate", lambda *_, values=measured: next(values))
        more = ("run.epochs=3", "run.test_images=2", f"run.select={select}")
        recipe = toy_recipe(REGISTRY, "classifier", "ce", "plain", *more)
        summary = train(recipe, tmp_path / select, registry=REGISTRY)
        assert (summary.best_epoch, summary.select) == (best, select)


@pytest.mark.parametrize("objective", sorted(REGISTRY["objective"]))
def test_an_objective_without_an_attack_selects_by_accuracy(objective: str) -> None:
    recipe = resolve(REGISTRY, named={"objective": {"use": objective}}).recipe
    unbounded = objective == "ebjdatreleased"  # its chain of x~ is not projected onto a ball
    attacks = unbounded or trained_threat(recipe.objective, 8.0) is not None
    assert recipe.run.select == ("pgd10" if attacks else "accuracy")
