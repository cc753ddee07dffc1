"""run.channels_last: the fixed rule of "auto", and what is refused on a CPU."""

from typing import Any

import pytest
import torch

from jemkit.errors import MisfitError
from jemkit.models.networks import SmallCNN
from jemkit.testing import toy_model, toy_task
from jemkit.training.build import laid_out

TASK = toy_task()
CPU = torch.device("cpu")


def is_last(model: Any) -> bool:
    weights = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert weights
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.parametrize(
    ("choice", "norm", "last"),
    [
        ("auto", "batch", True),
        ("auto", "instance", False),
        ("yes", "instance", True),
        ("no", "batch", False),
    ],
)
def test_auto_is_channels_last_but_with_instance_norm_on_a_cpu(
    choice: Any, norm: Any, last: bool
) -> None:
    model = toy_model(TASK, SmallCNN(channels=2, norm=norm))
    assert is_last(laid_out(model, choice, CPU)) == last


@pytest.mark.parametrize("width", [2, 15, 16])
def test_a_strided_convolution_of_few_channels_is_not_channels_last_on_a_cpu(width: int) -> None:
    """Its gradient in that format overwrites memory, so a process that computes it may abort."""

    def placed(choice: Any, device: torch.device = CPU) -> torch.nn.Module:
        layers = (torch.nn.Conv2d(3, width, 3), torch.nn.Conv2d(width, 4, 1, stride=2))
        return laid_out(torch.nn.Sequential(*layers), choice, device)

    narrow = width < 16
    assert is_last(placed("auto")) != narrow
    assert is_last(placed("auto", torch.device("cuda")))
    assert not is_last(placed("no"))
    if narrow:
        with pytest.raises(MisfitError, match="fewer than 16 input channels"):
            placed("yes")
