"""FID's family of measures: closed forms, sets that are equal, and torch-fidelity's own figures."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from strategies import normal, seeds
from torch import Tensor, nn
from toys import gen

from jemkit.metrics.plots import to_bytes
from jemkit.models.networks import seeded_init
from jemkit.runtime.torchvision_compat import torchvision
from jemkit_plugins.generation.features import Extracted, of_module
from jemkit_plugins.generation.fid import (
    Moments,
    frechet,
    inception_score,
    kernel_distance,
    mmd2,
    moments,
    nearest_rows,
    precision_recall,
)

DATA = Path(__file__).parents[2].parent / "shared" / "data"
RESNET = DATA / "checkpoints" / "resnet20-12fca82f.th"


def gaussian(mean: Tensor, covariance: Tensor, n: int = 100) -> Moments:
    return Moments(n, mean.double(), covariance.double() * (n - 1))


def rotation(seed: int, size: int) -> Tensor:
    q, _ = torch.linalg.qr(normal(seed, size, size, dtype=torch.float64))
    return q


@given(seed=seeds, width=st.integers(1, 9))
def test_the_distance_of_diagonal_gaussians_is_that_of_their_means_and_deviations(
    seed: int, width: int
) -> None:
    m1, m2, s1, s2 = normal(seed, 4, width, dtype=torch.float64)
    value = frechet(gaussian(m1, torch.diag(s1**2)), gaussian(m2, torch.diag(s2**2)))
    expected = (m1 - m2).square().sum() + (s1.abs() - s2.abs()).square().sum()
    assert value == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


@given(seed=seeds, width=st.integers(2, 9))
def test_covariances_that_commute_have_the_distance_of_their_eigenvalues(
    seed: int, width: int
) -> None:
    q = rotation(seed, width)
    v1, v2 = normal(seed + 1, 2, width, dtype=torch.float64).square()
    zero = torch.zeros(width)
    value = frechet(gaussian(zero, q * v1 @ q.T), gaussian(zero, q * v2 @ q.T))
    expected = (v1.sqrt() - v2.sqrt()).square().sum()
    assert value == pytest.approx(float(expected), rel=1e-7, abs=1e-7)


def test_a_distance_worked_by_hand() -> None:
    one = gaussian(torch.tensor([0.0, 0.0]), torch.diag(torch.tensor([1.0, 4.0])))
    other = gaussian(torch.tensor([3.0, 4.0]), torch.diag(torch.tensor([9.0, 16.0])))
    assert frechet(one, other) == pytest.approx(25 + (1 - 3) ** 2 + (2 - 4) ** 2)


@given(seed=seeds, width=st.integers(2, 12))
def test_the_distance_is_that_of_scipys_matrix_root(seed: int, width: int) -> None:
    a, b = (Moments.of(normal(seed + i, 40, width)) for i in range(2))
    root_ab = sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    trace = np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root_ab.real)
    expected = float((a.mean - b.mean).square().sum()) + float(trace)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("n", [16, 40, 400])  # fewer rows than features: a singular covariance
def test_a_set_has_no_distance_to_itself(n: int) -> None:
    result = Moments.of(5 + 3 * normal(0, n, 64))
    assert abs(frechet(result, result)) < 1e-3


@given(seed=seeds, sizes=st.lists(st.integers(0, 7), min_size=1, max_size=8))
def test_moments_of_any_parts_are_those_of_the_whole(seed: int, sizes: list[int]) -> None:
    rows = 100 + normal(seed, sum(sizes) + 2, 5)
    whole = Moments.of(rows)
    streamed = moments(torch.split(rows, [*sizes, 2]))
    assert streamed.n == len(rows)
    assert torch.allclose(streamed.mean, whole.mean, rtol=1e-12)
    assert torch.allclose(streamed.scatter, whole.scatter, rtol=1e-9, atol=1e-8)
    expected = torch.from_numpy(np.cov(rows.double().numpy(), rowvar=False))
    assert torch.allclose(streamed.covariance, expected, rtol=1e-9, atol=1e-8)


def test_a_covariance_of_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        _ = Moments.of(torch.zeros(1, 3)).covariance


def test_kid_of_one_distribution_is_0_on_average_and_no_biased_estimate() -> None:
    """A biased estimate is above 0 for every pair; this one lies on both sides of it."""
    pairs = [(normal(2 * i, 30, 8), normal(2 * i + 1, 30, 8)) for i in range(400)]
    value = torch.tensor([mmd2(a, b) for a, b in pairs])
    error = value.std() / math.sqrt(len(value))
    assert abs(value.mean()) < 3 * error
    assert (value < 0).float().mean() > 0.2


def test_kid_of_distributions_apart_is_far_above_its_spread() -> None:
    value = kernel_distance(normal(0, 300, 8), 1 + normal(1, 300, 8), gen(), subsets=10, size=100)
    assert value.mean > 5 * value.std > 0


def test_kids_kernel_worked_by_hand() -> None:
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    # k(1, 2) = 27; k(0, 1) = 1; k over the pairs: 1, 8, 1, 27
    assert mmd2(a, b) == pytest.approx(27 + 1 - 2 * (1 + 8 + 1 + 27) / 4)


@given(seed=seeds, n=st.integers(5, 30), copies=st.integers(1, 5))
@settings(max_examples=25)
def test_identical_sets_have_precision_and_recall_1(seed: int, n: int, copies: int) -> None:
    rows = normal(seed, n, 6, scale=10).repeat(copies, 1)
    assert precision_recall(rows, rows) == (1.0, 1.0)


def test_sets_far_apart_have_precision_and_recall_0() -> None:
    assert precision_recall(normal(0, 20, 4), 100 + normal(1, 20, 4)) == (0.0, 0.0)


def test_a_sampler_of_one_mode_has_precision_without_recall() -> None:
    modes = torch.cat([normal(0, 50, 4), 100 + normal(1, 50, 4)])
    precision, recall = precision_recall(normal(2, 50, 4), modes)
    assert precision > 0.8
    assert recall < 0.51


def test_a_ball_reaches_to_the_third_neighbour() -> None:
    reference = torch.tensor([[0.0], [1.0], [2.0], [4.0], [50.0]])
    # radii: 4 (1, 2, 4), 3 (1, 1, 3), 2 (1, 2, 2), 4 (2, 3, 4), 49 (46, 48, 49)
    samples = torch.tensor([[-3.9], [-4.1], [8.1], [99.5], [0.5]])
    inside = [True, False, True, False, True]  # 8.1 is 41.9 from 50
    assert precision_recall(samples, reference)[0] == sum(inside) / len(inside)


def test_too_few_rows_for_a_measure_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 3 rows"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="10 parts"):
        inception_score(torch.zeros(9, 2))
    with pytest.raises(ValueError, match="2 rows"):
        kernel_distance(torch.zeros(1, 2), torch.zeros(9, 2), gen())


@pytest.mark.parametrize("k", [2, 10, 1008])
def test_the_score_of_balanced_sure_predictions_is_the_number_of_classes(k: int) -> None:
    logits = 1e4 * torch.eye(k).repeat(10, 1)
    score = inception_score(logits, splits=10)
    assert score.mean == pytest.approx(k, rel=1e-9)
    assert score.std == pytest.approx(0, abs=1e-9 * k)


@given(seed=seeds)
def test_the_score_of_constant_predictions_is_1(seed: int) -> None:
    score = inception_score(normal(seed, 1, 7, scale=5).expand(60, -1), splits=5)
    assert score.mean == pytest.approx(1, abs=1e-9)


def test_nearest_rows_are_in_order_of_their_distance() -> None:
    b = torch.tensor([[9.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    distances, index = nearest_rows(torch.zeros(1, 2), b, 2)
    assert distances.tolist() == [[1.0, 5.0]]
    assert index.tolist() == [[1, 2]]


# torch-fidelity's figures, of the same images in the same features


class BasicBlock(nn.Module):
    """Two convolutions and an option-A shortcut (He et al. 2016)."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.out, self.stride = out, 1 if inside == out else 2
        self.conv1 = nn.Conv2d(inside, out, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        pad = (self.out - x.shape[1]) // 2
        shortcut = nn.functional.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, pad, pad)
        )
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + shortcut).relu()


class ResNet20(nn.Module):
    """The CIFAR ResNet up to its pooled features [B, 64], of [0, 1] images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for i, (inside, out) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = [BasicBlock(inside, out), BasicBlock(out, out), BasicBlock(out, out)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        h = self.bn1(self.conv1((x - mean) / std)).relu()
        h: Tensor = self.layer3(self.layer2(self.layer1(h)))
        return h.mean(dim=(2, 3))


def random_network() -> nn.Module:
    with seeded_init(gen()):
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.AdaptiveAvgPool2d(1)
        )
    return net.eval()


def resnet20() -> nn.Module:
    saved = torch.load(RESNET, map_location="cpu", weights_only=True)["state_dict"]
    net = ResNet20()
    net.load_state_dict({name.removeprefix("module."): w for name, w in saved.items()})
    return net.eval()


class Tensors(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


def theirs(
    name: str, net: Callable[[Tensor], Tensor], a: object, b: object, **more: object
) -> dict[str, float]:
    """The package's own figures, with a network registered by a name of its own."""
    torchvision()
    fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Registered(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("out",)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            assert images.dtype == torch.uint8
            return (net(images.float() / 255).flatten(1),)

    if name in FEATURE_EXTRACTORS_REGISTRY:
        del FEATURE_EXTRACTORS_REGISTRY[name]
    fidelity.register_feature_extractor(name, Registered)
    layers = {f"feature_layer_{metric}": "out" for metric in ("isc", "fid", "kid", "prc")}
    result: dict[str, float] = fidelity.calculate_metrics(
        input1=a, input2=b, feature_extractor=name, cuda=False, cache=False, verbose=False,
        save_cpu_ram=True, fid=True, kid=True, prc=True, **layers, **more,
    )  # fmt: skip
    return result


def check_equal(net: nn.Module, name: str, x: Tensor, reference: Tensor) -> None:
    features = of_module(net, name)
    with torch.no_grad():
        extracted: list[Extracted] = [
            features.extract(to_bytes(images)) for images in (x, reference)
        ]
    a, b = (side.features for side in extracted)
    n = len(x)
    messages = theirs(
        name, net, Tensors(to_bytes(x)), Tensors(to_bytes(reference)),
        kid_subsets=1, kid_subset_size=n, isc=True, isc_splits=4, samples_shuffle=False,
    )  # fmt: skip
    fid = frechet(moments(torch.split(a, 64)), moments(torch.split(b, 77)))
    kid = kernel_distance(a, b, gen(), subsets=1, size=n)
    assert fid == pytest.approx(messages["frechet_inception_distance"], abs=1e-3)
    assert kid.mean == pytest.approx(messages["kernel_inception_distance_mean"], abs=1e-3)
    assert precision_recall(a, b) == pytest.approx((messages["precision"], messages["recall"]))
    score = inception_score(a, splits=4)
    assert score.mean == pytest.approx(messages["inception_score_mean"], rel=1e-6)
    assert score.std == pytest.approx(messages["inception_score_std"], abs=1e-6)


def noise(seed: int, n: int = 200) -> Tensor:
    return torch.rand((n, 3, 16, 16), generator=gen(seed))


def test_the_figures_are_torch_fidelitys_in_the_features_of_a_random_network() -> None:
    check_equal(random_network(), "toy", noise(0) ** 2, noise(1))


def test_the_figures_are_torch_fidelitys_on_cifar_in_the_features_of_resnet_20() -> None:
    if not RESNET.exists() or not (DATA / "cifar10" / "restore.py").exists():
        pytest.skip("the shared data is not here")
    x = cifar_test_images(400).float() / 255
    blurred = nn.functional.avg_pool2d(x[:200], 3, 1, 1)
    check_equal(resnet20(), "resnet20", blurred, x[200:])


def cifar_test_images(n: int) -> Tensor:
    import importlib.util

    spec = importlib.util.spec_from_file_location("restore", DATA / "cifar10" / "restore.py")
    assert spec is not None
    assert spec.loader is not None
    restore = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(restore)
    images = torch.as_tensor(np.asarray(restore.load("test_batch")[0]))[:n]
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)


@pytest.mark.parametrize("value", [-0.3, 0.0, 1.0, 1.7, 127.49 / 255, 127.51 / 255, 1 / 255])
def test_pixels_are_rounded_and_clamped_once(value: float) -> None:
    expected = min(255, max(0, math.floor(value * 255 + 0.5)))
    assert to_bytes(torch.tensor([value])).tolist() == [expected]


def test_images_that_torch_fidelity_reads_from_files_are_the_bytes_that_we_measure(
    tmp_path: Path,
) -> None:
    from PIL import Image

    net, x, reference = random_network(), noise(2, 24) * 1.2 - 0.1, noise(3, 40)
    for i, image in enumerate(to_bytes(x)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:03d}.png")
    messages = theirs("files", net, str(tmp_path), Tensors(to_bytes(reference)), kid_subset_size=24)
    extract = of_module(net, "files").extract
    with torch.no_grad():
        a, b = (Moments.of(extract(to_bytes(images)).features) for images in (x, reference))
    assert frechet(a, b) == pytest.approx(messages["frechet_inception_distance"], abs=1e-3)
