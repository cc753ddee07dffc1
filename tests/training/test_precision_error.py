"""How exact gradients are in each precision, against float64."""

import json

import pytest
import torch
from cli_tools import jemkit
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy_recipe, toy_registry

from jemkit.errors import DataError
from jemkit.models.energy import ModelEnergy
from jemkit.models.networks import SmallCNN
from jemkit.runtime.modes import sampling_mode
from jemkit.runtime.pytree import same
from jemkit.sampling.kernels import eager_gradient
from jemkit.testing import toy_batch, toy_model, toy_task
from jemkit.training.build import build_run
from jemkit.training.profiling.precision_error import accuracy_of, errors, reference

TASK = toy_task()


@pytest.mark.parametrize("backbone", ["jem", "jempp", "mebm", "sadajem", "classifier"])
def test_fp32_is_nearly_exact_and_bf16_is_less_so(backbone: str) -> None:
    parts = build_run(toy_recipe(toy_registry(), backbone, "ce").recipe)
    fp32, bf16 = accuracy_of(parts, images=4)
    assert fp32.images == bf16.images == 4
    assert (fp32.precision, bf16.precision) == ("fp32", "bf16")
    assert fp32.median < 1e-4  # 2 ** -24 of each number, through a few layers
    assert fp32.median <= fp32.worst < bf16.worst
    assert 1e-4 < bf16.median < 1  # 2 ** -9 of each number


def test_measuring_leaves_model_and_torch_alone() -> None:
    parts = build_run(toy_recipe(toy_registry()).recipe)
    model, state = parts.backbone.model, torch.random.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    accuracy_of(parts, images=2)
    assert same(before, model.state_dict())
    assert training == [module.training for module in model.modules()]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.is_autocast_enabled("cpu")


def test_the_reference_is_the_gradient_in_float64_of_the_same_weights() -> None:
    model, x = toy_model(TASK, SmallCNN(channels=2)), toy_batch(TASK).x
    exact = reference(model, x)
    assert exact.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with sampling_mode(model, "batch_stats"):
        torch.testing.assert_close(exact.float(), eager_gradient(ModelEnergy(model), x))


def test_errors_by_hand() -> None:
    """|g| = 5 and an error of 0.5; |g| = 2 and none; one sign of four is another."""
    exact = torch.tensor([[3.0, 4.0], [0.5, -(3.75**0.5)]], dtype=torch.float64)
    rounded = exact.clone()
    rounded[0, 1] += 0.5
    rounded[1, 0] = -0.5  # an error of 1 in 2
    result = errors("bf16", rounded, exact)
    assert result.worst == pytest.approx(0.5)
    assert result.median == pytest.approx(0.1)  # torch's median of an even number is the lower
    assert result.flipped == 0.25


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3), error=st.floats(0, 0.5))
def test_an_error_is_relative(scale: float, error: float) -> None:
    exact = scale * torch.eye(3, dtype=torch.float64)
    result = errors("fp32", exact * (1 + error), exact)
    assert result.median == pytest.approx(error, abs=1e-6)
    assert result.worst == pytest.approx(error, abs=1e-6)
    assert result.flipped == 0


@pytest.mark.parametrize("sick", [0.0, float("nan")])
def test_where_no_error_can_be_measured_none_is_given(sick: float) -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    exact[1] *= sick
    with pytest.raises(DataError, match="no relative error in fp32 for 1 of 2 images"):
        errors("fp32", torch.ones(2, 3), exact)


def test_the_command_tells_each_precision_as_json_and_as_a_table() -> None:
    words = ["bench", "accuracy", "--backbone=jem", "--dataset=digits", "--device=cpu"]
    words += ["--images=3", "--set=run.max_train=80", "--set=backbone.buffer.capacity=200"]
    done = jemkit(*words, "--json")
    assert done.code == 0, done.err
    assert set(done.record) == {"protocol", "fp32", "bf16"}
    card = done.record["protocol"]
    assert (card["images"], card["norm"], card["network"]["use"]) == (3, "L2", "smallcnn")
    assert "digits" in card["selection"]
    assert json.dumps(done.record)
    assert 0 < done.record["fp32"]["median"] < done.record["bf16"]["median"]
    table = jemkit(*words)
    assert table.code == 0
    assert "signs flipped" in table.out
    assert "  images: 3\n" in table.out
