"""Test images told from others: the measures are the published ones, and the signs are right."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from imagefolders import split_folder
from strategies import normal, seeds, uniform
from torch import Tensor, nn
from toys import REGISTRY, gen

from jemkit import (
    Augmentation,
    ConfigError,
    Context,
    Figure,
    Images,
    MisfitError,
    Options,
    Threat,
    testing,
)
from jemkit.attacks.pixel_model import PixelModel, pixel_model
from jemkit.evaluation.evaluate import evaluate
from jemkit.evaluation.subjects import others_of
from jemkit.metrics.evaluator import measure
from jemkit.testing import toy_model, toy_task
from jemkit_plugins import datasets
from jemkit_plugins.ood import (
    OOD,
    SCORES,
    aupr,
    auroc,
    auroc_interval,
    detection,
    fpr_at,
    scores,
)

TASK = toy_task(n_train=30)
counts = st.integers(1, 60)


@st.composite
def two_sets(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores of positives and negatives, with and without ties."""
    seed, shift = draw(seeds), draw(st.floats(-2, 2))
    a = normal(seed, draw(counts), dtype=torch.float64) + shift
    b = normal(seed + 1, draw(counts), dtype=torch.float64)
    grain = draw(st.sampled_from([0.0, 0.5, 2.0]))
    return (a, b) if not grain else ((a / grain).round(), (b / grain).round())


@given(pair=two_sets())
def test_the_measures_are_those_of_scikit_learn(pair: tuple[Tensor, Tensor]) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    truth = [1] * len(pair[0]) + [0] * len(pair[1])
    score = torch.cat(pair).numpy()
    assert auroc(*pair) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    assert aupr(*pair) == pytest.approx(average_precision_score(truth, score), abs=1e-12)
    fpr, tpr, _ = roc_curve(truth, score, drop_intermediate=False)
    expected = fpr[(tpr >= 0.95 - 1e-9).argmax()]
    assert fpr_at(*pair, percent=95) == pytest.approx(expected, abs=1e-12)


@given(pair=two_sets())
def test_turning_the_score_round_turns_the_auroc_round(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    assert auroc(-a, -b) == pytest.approx(1 - auroc(a, b), abs=1e-12)
    assert auroc(b, a) == pytest.approx(1 - auroc(a, b), abs=1e-12)


@given(pair=two_sets())
def test_an_aurocs_interval_holds_it(pair: tuple[Tensor, Tensor]) -> None:
    low, high = auroc_interval(*pair)
    assert 0 <= low <= auroc(*pair) <= high <= 1


def test_measures_of_six_scores_are_as_worked_by_hand() -> None:
    positive, negative = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2.0, 0.0])
    assert auroc(positive, negative) == pytest.approx((2 + 1.5 + 1) / 6)
    assert aupr(positive, negative) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert fpr_at(positive, negative, percent=95) == 0.5
    assert auroc(positive, positive) == pytest.approx(0.5)


def test_a_score_that_is_not_a_number_leaves_no_measure() -> None:
    broken = detection(torch.tensor([1.0, float("nan")]), torch.tensor([0.0]))
    assert all(value != value for value in broken)


class Bright(nn.Module):
    """Logits that grow with the brightness of an image, or fall."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1, keepdim=True)
        return self.sign * mean * torch.tensor([9.0, 8.0, 7.0])


def figures(model: nn.Module, data: Images, judge: OOD, **settings: Any) -> dict[str, Figure]:
    ctx = Context(gen(), Threat("Linf", 8.0), batch_size=16, card={"split": "test"}, **settings)
    return {f.name: f for f in measure(pixel_model(model), data, [judge], ctx)}


def test_test_images_that_are_likelier_have_an_auroc_above_a_half() -> None:
    """Larger log p(x) = -E(x) says in-distribution, and test images are the positives."""
    data = Images(uniform(0, 40, 1, 8, 8, low=0.8, high=1), torch.arange(40) % 3)
    likelier, unlikelier = (figures(Bright(s), data, OOD(made=("uniform",))) for s in (1, -1))
    assert likelier["auroc/uniform"].value == 1
    assert likelier["auroc/uniform/joint"].value == 1
    assert likelier["fpr95/uniform"].value == 0
    assert unlikelier["auroc/uniform"].value == 0
    assert unlikelier["fpr95/uniform"].value == 1


@given(seed=st.integers(0, 50))
def test_the_scores_are_what_their_names_say(seed: int) -> None:
    model, data = toy_model(TASK, seed=seed).eval(), TASK.images("valid")
    ctx = Context(gen(), Threat("Linf", 8.0), batch_size=13)
    by_image = scores(PixelModel(model, TASK.bounds), data, ctx)
    x = data.unit().requires_grad_()
    out = model(TASK.bounds.from_unit(x))
    (slope,) = torch.autograd.grad(out.energy.sum(), x)
    joint = torch.stack([-out.joint(torch.full_like(data.y, k)) for k in range(3)]).amax(0)
    expected = {
        "logp": -out.energy,
        "softmax": out.logits.softmax(1).amax(1),
        "gradnorm": -slope.flatten(1).norm(dim=1),
        "joint": joint,
    }
    assert list(by_image) == list(SCORES) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(by_image[name].float(), value.detach(), rtol=1e-4, atol=1e-5)


def made(x: Tensor, *names: Any, seed: int = 0) -> dict[str, Tensor]:
    ctx = Context(gen(), Threat("Linf", 8), seed=seed)
    return {name: images for name, images, _ in OOD(made=names or None)._sets(x, ctx)}


@given(seed=seeds, n=st.integers(1, 9), channels=st.sampled_from([1, 3]))
def test_made_sets_are_images_of_the_same_shape_that_the_seed_alone_decides(
    seed: int, n: int, channels: int
) -> None:
    x = uniform(seed, n, channels, 8, 8, low=0)
    changed = made(x, seed=seed)
    assert ("rotation" in changed) == (channels == 1)
    for name, images in changed.items():
        assert images.shape == x.shape
        assert images.min() >= 0
        assert images.max() <= 1
        assert torch.equal(made(x, name, seed=seed)[name], images)  # whatever is drawn beside it


def test_an_interpolation_is_the_mean_of_two_images_and_each_serves_twice() -> None:
    x = torch.eye(5).view(5, 1, 1, 5)
    changed = made(x, "interpolation")["interpolation"].flatten(1)
    assert (changed.sum(1) == 1).all()
    assert ((changed == 0.5).sum(1) == 2).all()
    assert ((changed == 0.5).sum(0) == 2).all()


def test_a_constant_image_has_one_colour_and_a_quarter_turn_is_undone_by_three() -> None:
    x = uniform(3, 4, 1, 8, 8, low=0)
    changed = made(x, "constant", "rotation")
    assert (changed["constant"].flatten(1).std(1) == 0).all()
    assert torch.equal(changed["rotation"].rot90(3, (2, 3)), x)


class Elsewhere(Options):
    """Images of another source, as many as asked for."""

    radius_px: ClassVar[float] = 8
    augmentation: ClassVar[Augmentation] = Augmentation()

    shape: tuple[int, int, int] = (1, 8, 8)
    n: int = 50
    n_classes: int = 2

    def load(self, split: str) -> Images:
        assert split == "test"
        x = (uniform(7, self.n, *self.shape, low=0) * 255).to(torch.uint8)
        return Images(x, torch.arange(self.n) % 2)


def test_another_data_set_gives_as_many_test_images_with_the_models_channels() -> None:
    model, data = toy_model(TASK), TASK.images("valid")
    colour, few = Elsewhere(shape=(3, 8, 8)), Elsewhere(n=5)
    measured = figures(model, data, OOD(made=(), against=(colour, few)))
    assert measured["auroc/elsewhere"].protocol["counts"] == [30, 30]
    assert measured["auroc/elsewhere"].protocol["channels"] == "made grey"
    assert measured["auroc/elsewhere2"].protocol["counts"] == [30, 5]
    assert measured["auroc/elsewhere2"].n == 30


def test_grey_images_serve_a_model_of_colour() -> None:
    task = toy_task(channels=3, n_train=9)
    measured = figures(toy_model(task), task.images("valid"), OOD(made=(), against=(Elsewhere(),)))
    assert measured["auroc/elsewhere"].protocol["channels"] == "grey thrice"


def test_images_of_another_size_are_refused_with_what_to_do() -> None:
    judge = OOD(made=(), against=(Elsewhere(shape=(1, 16, 16)),))
    with pytest.raises(MisfitError, match=r"\[1, 16, 16\].*\[1, 8, 8\].*size = 8"):
        figures(toy_model(TASK), TASK.images("valid"), judge)


def write_folder(root: Path, size: int) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for i in range(3):
                pixels = (uniform(i, size, size, low=0) * 255).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")


def test_a_registered_data_set_is_taken_by_its_name(tmp_path: Path) -> None:
    write_folder(tmp_path, 20)
    table = {"use": "folder", "dir": str(tmp_path), "size": 8}
    record = evaluate(
        toy_model(TASK, seed=1), TASK.images("valid"), registry=REGISTRY, only=("ood",),
        options={"ood": {"against": [table], "made": ["uniform"]}},
    )  # fmt: skip
    assert record.figure("auroc/folder").protocol["counts"] == [30, 6]
    assert set(record.tables["ood"]) == {"uniform", "folder"}
    assert set(record.tables["ood"]["folder"]) == set(SCORES)
    cell = record.tables["ood"]["folder"]["softmax"]
    assert cell["auroc"] == record.value("auroc/folder/softmax")
    assert cell["n"] == 6


def test_ood_keeps_the_laws_of_an_evaluator_and_leaves_random_state_alone() -> None:
    before = torch.get_rng_state()
    testing.check_evaluator(OOD())
    assert torch.equal(before, torch.get_rng_state())


def test_every_figure_says_its_score_its_set_and_its_counts() -> None:
    measured = figures(toy_model(TASK), TASK.images("valid"), OOD())
    sets = ("interpolation", "uniform", "gaussian", "constant", "rotation")
    names = {f"{m}/{s}{e}" for m in ("auroc", "aupr", "fpr95") for s in sets
             for e in ("", "/softmax", "/gradnorm", "/joint")}  # fmt: skip
    assert set(measured) == names
    for figure in measured.values():
        assert {"score", "ood", "made", "positive", "counts"} <= set(figure.protocol)


def test_the_data_sets_beside_the_judged_one_are_taken_where_none_is_named() -> None:
    x = uniform(0, 6, 3, 8, 8, low=0)
    beside = {"other": Images((255 * uniform(1, 9, 3, 8, 8, low=0)).byte(), torch.arange(9))}
    ctx = Context(gen(), Threat("Linf", 8), others=lambda: beside)
    sets = {name: (images, how) for name, images, how in OOD(made=())._sets(x, ctx)}
    images, how = sets["other"]
    assert images.shape == x.shape
    assert how["selection"] == "6 of 9 test images, by the seed"


def test_data_sets_that_no_installed_package_reads_are_named_and_the_figures_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise ConfigError("torchvision is not installed")

    monkeypatch.setattr(datasets, "torchvision", missing)
    folder = REGISTRY["dataset"]["folder"](dir=split_folder(tmp_path))
    ctx = Context(gen(), Threat("Linf", 8.0), others=others_of(folder, REGISTRY))
    figures = measure(PixelModel(toy_model(TASK)), TASK.images("valid"), [OOD()], ctx)
    assert figures
    assert "images of cifar10, cifar100, svhn in" in caplog.text
    assert "are skipped: torchvision is not installed" in caplog.text
