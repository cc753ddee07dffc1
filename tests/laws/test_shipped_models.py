"""The models in examples/models load without data, are small, and name no folder of a machine."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from toys import root

import jemkit
from jemkit.training.model_folder import FILES

MODELS = sorted(path.parent for path in (root() / "examples" / "models").glob("*/config.json"))
MADE = (".evaluation", ".evaluation.lock", "evaluation.json", "evaluation.safetensors")
"""What evaluating a model writes beside it; git ignores it."""
each = pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)


def test_there_are_models_and_the_page_lists_them() -> None:
    page = (root() / "examples" / "models" / "README.md").read_text()
    assert sorted(re.findall(r"^\| `(\S+)`", page, re.M)) == [folder.name for folder in MODELS]


@each
def test_a_model_is_small_and_names_no_place(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} <= {*FILES, *MADE}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    for path in folder.glob("*.json"):
        assert not re.search(r'"(/|~/)', path.read_text()), path.name


@each
def test_a_model_loads_without_data(folder: Path) -> None:
    model = jemkit.load(folder)
    images = torch.rand(2, *model.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model.shape == (3, 16, 16)
        assert model.predict_proba(images).sum(1).allclose(torch.ones(2))
        assert model.energy(images).isfinite().all()


@each
def test_a_model_has_the_figures_that_the_table_needs(folder: Path) -> None:
    figures = json.loads((folder / "figures.json").read_text())["figures"]
    images = {(f["name"], f["protocol"]["images"]) for f in figures}
    assert {("clean", 10_000), ("pgd20", 10_000), ("aa", 1000)} <= images


@each
@pytest.mark.slow
def test_a_model_reaches_its_clean_accuracy(folder: Path) -> None:
    if "JEMKIT_CIFAR10" not in os.environ:
        pytest.skip("needs CIFAR-10: JEMKIT_CIFAR10=DIR")
    made = jemkit.installed()["dataset"]["cifar10"](dir=os.environ["JEMKIT_CIFAR10"], size=16)
    test = made.load("test")
    model = jemkit.load(folder)
    with torch.no_grad():
        parts = [model(x) for x in test.unit().split(500)]
    accuracy = (torch.cat(parts).argmax(1) == test.y).double().mean().item()
    figures = json.loads((folder / "figures.json").read_text())["figures"]
    stored = next(f for f in figures if f["name"] == "clean" and f["protocol"]["images"] == 10_000)
    assert accuracy == pytest.approx(stored["value"], abs=2e-4)
