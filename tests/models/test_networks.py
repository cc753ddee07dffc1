"""Networks have the layers, sizes and counts that their papers give."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal
from torch import Tensor, nn
from toys import gen

from jemkit.models.networks import MLP, WRN, SmallCNN, matrix_pooled, seeded_init
from jemkit.models.norms import Norm, norm_layer
from jemkit.runtime.modes import eval_mode, frozen


def built(spec: WRN | SmallCNN | MLP, *shape: int) -> nn.Module:
    with seeded_init(gen()):
        return spec.build(shape)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(("norm", "millions"), [("none", 36.47), ("batch", 36.49)])
def test_wrn_28_10_has_the_parameters_of_the_jem_family(norm: str, millions: float) -> None:
    with torch.device("meta"):
        network = WRN(norm=norm).build((3, 32, 32))
    heads = 640 * 10 + 10 + 640 + 1  # the classifier, and the released code's unused energy head
    assert round((count(network) + heads) / 1e6, 2) == millions


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 2), (28, 10)])
def test_a_wide_residual_network_has_depth_minus_three_convolutions_and_its_shortcuts(
    depth: int, width: int
) -> None:
    with torch.device("meta"):
        network = WRN(depth=depth, width=width, norm="none").build((3, 32, 32))
    kernels = [m.kernel_size[0] for m in convolutions(network)]
    assert kernels.count(3) == 1 + 6 * ((depth - 4) // 6)
    assert kernels.count(1) == (3 if width > 1 else 2)  # at width 1 the first stage changes nothing
    assert network.width == 64 * width
    assert all(m.bias is not None for m in convolutions(network))


def test_the_stride_sits_on_the_second_convolution_and_on_the_shortcut() -> None:
    network = built(WRN(depth=10, width=1), 1, 32, 32)
    strides = [(b.conv1.stride, b.conv2.stride) for b in network.blocks]
    assert strides == [((1, 1), (1, 1)), ((1, 1), (2, 2)), ((1, 1), (2, 2))]
    assert network.blocks[1].shortcut.stride == (2, 2)


@pytest.mark.parametrize(("size", "stages"), [(8, 3), (32, 3), (63, 3), (64, 4)])
def test_images_of_64_px_and_more_get_a_fourth_stage(size: int, stages: int) -> None:
    network = built(WRN(depth=10, width=1), 3, size, size).eval()
    assert len(network.blocks) == stages
    features = network(normal(0, 2, 3, size, size))
    assert features.shape == (2, 16 * 2 ** (stages - 1))
    assert features.isfinite().all()


@given(depth=st.integers(10, 60))
def test_a_depth_that_is_not_6_n_plus_4_is_refused(depth: int) -> None:
    if (depth - 4) % 6 == 0:
        assert WRN(depth=depth).depth == depth
        return
    with pytest.raises(ValueError, match="6 n"):
        WRN(depth=depth)


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64])
@pytest.mark.parametrize("norm", ["none", "batch", "instance", "group"])
def test_the_small_network_takes_every_image_size(size: int, norm: str) -> None:
    network = built(SmallCNN(channels=3, norm=norm), 1, size, size)
    assert network(normal(0, 2, 1, size, size)).shape == (2, network.width)


def test_the_small_network_has_the_parameters_that_its_docstring_says() -> None:
    network = built(SmallCNN(), 1, 8, 8)
    assert 18_500 < count(network) + network.width * 10 + 10 < 19_500


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_perceptron_has_its_layers(layers: int) -> None:
    network = built(MLP(hidden=5, layers=layers), 3, 2, 2)
    assert sum(isinstance(m, nn.Linear) for m in network.modules()) == layers
    assert network(normal(0, 4, 3, 2, 2)).shape == (4, 5)


def test_the_momentum_of_batch_norm_is_an_option() -> None:
    for momentum in (0.1, 0.9):
        network = built(WRN(depth=10, width=1, bn_momentum=momentum), 1, 8, 8)
        collected = {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
        assert collected == {momentum}
    assert WRN().bn_momentum == 0.1


@pytest.mark.parametrize(("norm", "kind"), [
    ("none", nn.Identity), ("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d),
    ("group", nn.GroupNorm),
])  # fmt: skip
def test_a_norm_is_what_it_is_called(norm: str, kind: type[nn.Module]) -> None:
    assert isinstance(norm_layer(norm, 6), kind)


@given(seed=st.integers(0, 1000))
def test_lending_a_generator_moves_it_and_leaves_torchs_own_alone(seed: int) -> None:
    own, rng = torch.get_rng_state(), gen(seed)
    before = rng.get_state()
    with seeded_init(rng):
        one = nn.Linear(3, 3)
    with seeded_init(rng):
        other = nn.Linear(3, 3)
    assert torch.equal(torch.get_rng_state(), own)
    assert not torch.equal(rng.get_state(), before)
    assert not torch.equal(one.weight, other.weight)


@given(
    seed=st.integers(0, 99), channels_last=st.booleans(), norm=st.sampled_from(["batch", "sync"])
)
@settings(max_examples=12)
def test_frozen_weights_give_the_same_slopes_to_the_images_and_their_slopes(
    seed: int, channels_last: bool, norm: Norm
) -> None:
    network = built(WRN(depth=10, width=1, norm=norm), 3, 8, 8).double()
    network(normal(seed, 16, 3, 8, 8).double())  # running statistics that are not 0 and 1
    if channels_last:
        network.to(memory_format=torch.channels_last)
    x = normal(seed + 1, 4, 3, 8, 8).double().requires_grad_()

    def slopes() -> list[Tensor]:
        value = network(x).square().sum()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        return [value, first, *torch.autograd.grad(first.square().sum(), x)]

    with eval_mode(network):
        calls = slopes()
        with frozen(network):
            rested = slopes()
    assert torch.equal(calls[0], rested[0])
    torch.testing.assert_close(rested, calls, rtol=1e-12, atol=1e-14)


def test_a_frozen_norm_keeps_what_it_made_for_its_backward_pass_and_not_what_it_read() -> None:
    network = built(WRN(depth=10, width=1), 3, 8, 8)
    read: list[Tensor] = []
    for block in network.blocks:
        block.norm2.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))

    def saved_places() -> set[int]:
        """Where the maps lie that a pass keeps for its backward one."""
        collected: list[Tensor] = []
        x = normal(0, 5, 3, 8, 8).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: collected.append(t) or t, lambda t: t
        ):
            network(x)
        return {t.data_ptr() for t in collected}

    with eval_mode(network):
        collected = saved_places()
        assert {t.data_ptr() for t in read} <= collected
        read.clear()
        with frozen(network):
            collected = saved_places()
            assert read
            assert not {t.data_ptr() for t in read} & collected


@pytest.mark.parametrize("size", [5, 7, 14, 16, 4])
def test_pooling_by_a_matrix_is_adaptive_pooling(size: int) -> None:
    h = normal(size, 2, 3, size, size)
    torch.testing.assert_close(matrix_pooled(h, 4), F.adaptive_avg_pool2d(h, 4))
