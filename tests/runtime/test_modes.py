"""A mode lasts as long as its block, and is put back module by module."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from strategies import normal
from torch import nn

from jemkit.runtime.modes import eval_mode, frozen, frozen_batch_stats, sampling_mode
from jemkit.testing import toy_model, toy_task
from jemkit.testing.law import state_of

TASK = toy_task()
Mode = Callable[[nn.Module], AbstractContextManager[None]]
MODES: dict[str, Mode] = {
    "eval": eval_mode,
    "frozen": frozen,
    "frozen_batch_stats": frozen_batch_stats,
    "batch_stats": lambda m: sampling_mode(m, "batch_stats"),
    "running_stats": lambda m: sampling_mode(m, "running_stats"),
    "released": lambda m: sampling_mode(m, "released"),
}


def patchwork() -> nn.Module:
    """A model whose modules stand in modes of their own, and one weight of which rests."""
    model = toy_model(TASK)
    model.train()
    model.network.norm2.eval()
    model.network.norm3.track_running_stats = False
    model.network.first.weight.requires_grad_(False)
    return model


def tracked(model: nn.Module) -> list[bool]:
    return [m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", MODES)
def test_every_mode_restores_the_mode_before_it_module_by_module(name: str) -> None:
    model = patchwork()
    before, tracks = state_of(model), tracked(model)
    with MODES[name](model):
        pass
    after = state_of(model)
    assert after["modes"] == before["modes"]
    assert after["requires_grad"] == before["requires_grad"]
    assert tracked(model) == tracks


@pytest.mark.parametrize("name", MODES)
def test_every_mode_restores_the_mode_before_it_after_an_error(name: str) -> None:
    model = patchwork()
    before, tracks = state_of(model), tracked(model)

    def fails() -> None:
        with MODES[name](model):
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fails()
    assert state_of(model)["modes"] == before["modes"]
    assert state_of(model)["requires_grad"] == before["requires_grad"]
    assert tracked(model) == tracks


@pytest.mark.parametrize("name", ["eval", "frozen_batch_stats", "batch_stats", "running_stats"])
def test_running_statistics_stand_still_bit_for_bit(name: str) -> None:
    model = toy_model(TASK)
    model.train()
    model(normal(0, 8, *TASK.shape))
    before = {n: b.clone() for n, b in model.named_buffers()}
    with MODES[name](model):
        model(normal(1, 8, *TASK.shape, scale=5.0))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_the_released_mode_moves_running_statistics_as_the_released_codes_do() -> None:
    model = toy_model(TASK)
    before = model.network.norm1.running_mean.clone()
    with sampling_mode(model, "released"):
        model(normal(1, 8, *TASK.shape, scale=5.0))
    assert not torch.equal(model.network.norm1.running_mean, before)


def test_batch_stats_normalise_by_the_batch_and_running_stats_do_not() -> None:
    model = toy_model(TASK)
    x = normal(0, 8, *TASK.shape)
    other = torch.cat([x[:4], 3 * x[4:] + 1])
    with torch.no_grad(), sampling_mode(model, "batch_stats"):
        assert not torch.allclose(model(x).energy[:4], model(other).energy[:4], atol=1e-4)
    with torch.no_grad(), sampling_mode(model, "running_stats"):
        torch.testing.assert_close(model(x).energy[:4], model(other).energy[:4])


def test_no_chain_drops_out_anything_by_default() -> None:
    model = toy_model(TASK)
    model.network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 64))
    with sampling_mode(model, "batch_stats"):
        assert not model.network[1].training


@pytest.mark.parametrize("mode", ["batch_stats", "running_stats", "released"])
def test_a_chain_sees_frozen_weights_in_every_mode(mode: str) -> None:
    model = toy_model(TASK)
    with sampling_mode(model, mode):
        assert not any(p.requires_grad for p in model.parameters())
        assert not model(normal(0, 4, *TASK.shape)).energy.requires_grad


def test_frozen_weights_get_no_graph() -> None:
    model = toy_model(TASK).eval()
    with frozen(model):
        assert not model(normal(0, 2, *TASK.shape)).energy.requires_grad
