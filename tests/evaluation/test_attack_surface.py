"""What attacks do not see is said in the record; a teacher is neither judged nor exported."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import backbone_for, backbone_of, toy_recipe, toy_registry

from jemkit import Images, MisfitError, evaluate, train
from jemkit.attacks.pixel_model import PixelModel
from jemkit.attacks.purification import Refinement, refined
from jemkit.evaluation.evaluate import unattacked
from jemkit.evaluation.export import export
from jemkit.evaluation.subjects import subject_at
from jemkit.runtime.checkpoint import load_weights
from jemkit.runtime.files import load_tensors
from jemkit.runtime.pytree import same
from jemkit.testing.toys import toy_images

PGD = ("pgd", "aa")


def model_of(backbone: str, objective: str = "ce") -> PixelModel:
    return PixelModel(backbone_for(objective, backbone).model.eval())


def test_folded_logits_are_named() -> None:
    (text,) = unattacked(model_of("classifier", "ducat"), PGD)
    assert "2K logits, and attacks see K, folded by lse" in text
    assert "foldings" in text


def test_an_energy_head_is_named_unless_an_attack_uses_it() -> None:
    (text,) = unattacked(model_of("mebm"), PGD)
    assert "E(x) has a head of its own" in text
    assert text.endswith("; add --attack energy")
    for name in ("energy", "detector"):
        assert not unattacked(model_of("mebm"), (*PGD, name))


def test_a_purification_is_named_unless_an_attack_goes_past_it() -> None:
    purified = refined(model_of("jem"), Refinement(steps=1))
    (text,) = unattacked(purified, PGD)
    assert "can hide its gradient" in text
    assert not unattacked(purified, ("bpda",))


@pytest.mark.parametrize("backbone", ["classifier", "jem", "dat"])
def test_of_a_model_that_answers_by_its_logits_nothing_is_named(backbone: str) -> None:
    assert not unattacked(model_of(backbone), PGD)


def test_the_record_holds_the_warning() -> None:
    model, data = model_of("classifier", "ducat"), toy_images(9, 3, 8, 1, 0)
    record = evaluate(model, data, n_classes=3, attacks=("pgd",), eps_px=8, only=("accuracy",))
    assert any("attack surface: the model has 2K logits" in text for text in record.warnings)


class Doubled(nn.Module):
    """2K logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def test_twice_the_logits_are_refused_with_what_to_do() -> None:
    data = Images(*toy_images(9, 3, 8, 1, 0))
    with pytest.raises(MisfitError, match=r"fold each with its class inside the model"):
        evaluate(Doubled(), data, n_classes=3, attacks=("pgd",), eps_px=8)


def test_of_lbgat_the_student_alone_is_judged_and_exported(tmp_path: Path) -> None:
    registry = toy_registry()
    options = ["run.epochs=1", "objective.attack.steps=1"]
    recipe = toy_recipe(registry, "classifier", "lbgat", "plain", *options)
    train(recipe, tmp_path / "run", registry=registry)
    student = load_weights(tmp_path / "run" / "checkpoints" / "best")
    names = set(backbone_of("classifier").model.state_dict())
    assert set(student) == names
    export(tmp_path / "run", out=tmp_path / "model", registry=registry)
    (file,) = (tmp_path / "model").glob("model*.safetensors")
    assert same(load_tensors(file), student)
    judged = subject_at(tmp_path / "run", registry, torch.device("cpu")).model
    assert same(judged.model.state_dict(), student)
