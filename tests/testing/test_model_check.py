"""`jemkit check`: each fault of a model fails the check that names it."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_tools import jemkit
from torch import Tensor, nn

from jemkit import ConfigError, PixelModel, installed
from jemkit.data import Images
from jemkit.evaluation.subjects import EvalTarget, subject_of
from jemkit.evaluation.user_code import Normalised
from jemkit.testing import toy_task
from jemkit.testing.model_check import ModelReport, check_model
from jemkit.testing.toys import toy_backbone


class Centroids(nn.Module):
    """Logits by the distance to the mean digit of each class, with a fault."""

    def __init__(self, means: Tensor, fault: Callable[["Centroids", Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.fault = nn.Linear(64, 10), fault
        self.register_buffer("passes", torch.zeros(()))
        with torch.no_grad():
            self.linear.weight.copy_(means)
            self.linear.bias.copy_(-means.square().sum(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fault(self, x)

    def logits(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))  # type: ignore[no-any-return]

    def count(self) -> Tensor:
        self.get_buffer("passes").add_(1)
        return torch.zeros(())


@pytest.fixture(scope="module")
def digits() -> Images:
    return installed(third_party=False)["dataset"]["digits"]().load("test")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def means(digits: Images) -> Tensor:
    x = digits.unit().flatten(1)
    return torch.stack([x[digits.y == k].mean(0) for k in range(10)])


def judged(module: nn.Module, digits: Images) -> tuple[EvalTarget, ModelReport]:
    target = subject_of(Normalised(module, [0.0], [1.0]), digits, 10)
    return target, check_model(target)


def faulty(report: ModelReport, state: str = "fail") -> list[str]:
    return [check.name for check in report.checks if check.state == state]


def test_a_sound_model_passes_and_its_input_is_shown(means: Tensor, digits: Images) -> None:
    _, report = judged(Centroids(means, Centroids.logits), digits)
    assert (faulty(report), faulty(report, "warn")) == ([], [])
    assert report.input["radius_in_model_units"] == [8 / 255]
    shown = {check.name: check.what for check in report.checks}
    assert shown["normalization"].startswith("none")
    assert "8/255 in L-inf, 0.03137 of the pixel range" in shown["radius"]
    scaled = Normalised(Centroids(means, Centroids.logits), [0.0], [0.5])
    report = check_model(subject_of(scaled, digits, 10), 51)
    assert report.input["radius_in_model_units"] == pytest.approx([0.4])
    assert "(x - [0]) / [0.5]" in {check.what for check in report.checks}


def noisy(_: Centroids, z: Tensor) -> Tensor:
    return nn.functional.dropout(z, 0.5, training=True)


FAULTS: dict[str, Callable[[Centroids, Tensor], Tensor]] = {
    "weights": lambda m, x: m.logits(x),
    "logits": lambda m, x: m.logits(x)[:, :9],
    "eval mode": lambda m, x: m.logits(x) + m.count(),
    "determinism": lambda m, x: noisy(m, m.logits(x)),
    "batch": lambda m, x: m.logits(x - x.mean(0) + 0.3),
    "corners": lambda m, x: m.logits(x) + 0 / x.flatten(1).amax(1, keepdim=True),
    "outputs": lambda m, x: m.logits(x).softmax(1),
    "gradient": lambda m, x: m.logits(x.detach()),
    "accuracy": lambda m, x: m.logits(x).roll(1, 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_the_check_that_names_it(name: str, means: Tensor, digits: Images) -> None:
    module = Centroids(means, FAULTS[name])
    if name == "weights":
        module.register_buffer("spare", torch.tensor(float("nan")))
    _, report = judged(module, digits)
    assert name in faulty(report)


def test_a_gradient_that_is_not_the_outputs_is_a_warning(means: Tensor, digits: Images) -> None:
    def stepped(model: Centroids, x: Tensor) -> Tensor:
        return model.logits(x + ((4 * x).round() / 4 - x).detach())

    _, report = judged(Centroids(means, stepped), digits)
    assert "slope" in faulty(report, "warn")


def test_another_range_that_fits_better_is_advised(means: Tensor, digits: Images) -> None:
    def of_bytes(model: Centroids, x: Tensor) -> Tensor:
        return model.logits(x / 255)

    _, report = judged(Centroids(means, of_bytes), digits)
    (accuracy,) = (check for check in report.checks if check.name == "accuracy")
    assert accuracy.state in ("warn", "fail")
    assert "the module may expect 0..255" in accuracy.advice


def test_a_model_that_cannot_be_passed_stops_there(digits: Images) -> None:
    target, _ = judged(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits)
    broken = PixelModel(target.model.model)
    broken.model.network = nn.Sequential(nn.Flatten(), nn.Linear(65, 10))  # type: ignore[assignment]
    report = check_model(target._replace(model=broken))
    assert report.checks[-1].name == "logits"
    assert "RuntimeError: mat1 and mat2" in report.checks[-1].what


@pytest.mark.parametrize("radius", [0.03, -1.0, math.nan, 256.0])
def test_a_radius_that_no_evaluation_takes_is_refused(
    radius: float, means: Tensor, digits: Images
) -> None:
    with pytest.raises(ConfigError, match=r"eps.px"):
        check_model(subject_of(Centroids(means, Centroids.logits), digits, 10), radius)


def test_a_density_is_tried() -> None:
    task = toy_task()
    backbone, data = toy_backbone(task), task.images("valid")
    model = PixelModel(backbone.model, task.bounds, backbone.density_or_none)
    report = check_model(subject_of(model, data, task.n_classes))
    (sampling,) = (check for check in report.checks if check.name == "sampling")
    assert sampling.state == "ok"
    assert "a step stays finite" in sampling.what


def test_the_command_checks_and_ends_with_1_on_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))\n"
    )
    done = jemkit("check", f"{file}:build")
    assert done.code == 1
    assert "is run as Python code" in done.err
    assert "fail  outputs" in done.out
    done = jemkit("check", f"{file}:build", "--mean=0.3", "--std=0.4", "--json")
    assert done.code == 1
    assert not done.record["ok"]
    assert done.record["input"]["normalization"]["std"] == pytest.approx([0.4])
    assert jemkit("check", str(tmp_path / "none")).code == 6
