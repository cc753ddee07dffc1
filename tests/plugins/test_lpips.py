"""LPIPS is the package's number, of a frozen network that looks at the clean images once."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from jemkit.data import Bounds
from jemkit.errors import ConfigError, DataError, MisfitError
from jemkit.models.distances import Distance
from jemkit.runtime.torchvision_compat import torchvision
from jemkit_plugins.lpips import LPIPS, jemkit_distances, network

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "lpips"
MODELS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
INSIDE = Bounds(-1, 1)
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:.*weights")  # the package's way to torchvision

few = settings(deadline=None, max_examples=4)


def features(net: str) -> nn.Sequential:
    """torchvision's layers with random weights."""
    options = {"init_weights": False} if net == "vgg" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: nn.Sequential = getattr(torchvision().models, MODELS[net])(**options).features
    return layers


def named(layers: nn.Module) -> dict[str, Tensor]:
    return {f"features.{name}": w.detach().clone() for name, w in layers.state_dict().items()}


def package(net: str, layers: nn.Sequential) -> nn.Module:
    """The lpips package's own distance, with these layers as its trunk."""
    torchvision()
    import lpips

    with torch.random.fork_rng():
        theirs: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    for piece in theirs.get_submodule("net").children():
        for index, layer in piece.named_children():
            layer.load_state_dict(layers[int(index)].state_dict())
    return theirs


def images(seed: int, n: int = 2, channels: int = 3, size: int = 32) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=rng) * 2 - 1


def distance(spec: LPIPS, x: Tensor, x_adv: Tensor, bounds: Bounds = INSIDE) -> Tensor:
    # lpips never looks at the model
    return spec.bind(None, x, bounds)(x_adv)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alex() -> nn.Sequential:
    return features("alex")


@pytest.fixture(scope="module")
def spec(alex: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> LPIPS:
    path = tmp_path_factory.mktemp("trunk") / "alex.safetensors"
    save_file(named(alex), path)
    return LPIPS(weights=path)


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of torch's, and none of networks built before."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    network.cache_clear()
    yield tmp_path / "hub" / "checkpoints"
    network.cache_clear()


def test_lpips_is_offered_as_a_distance(spec: LPIPS) -> None:
    assert jemkit_distances() == {"lpips": LPIPS}
    assert isinstance(spec, Distance)


@pytest.mark.parametrize("net", ["alex", pytest.param("vgg", marks=pytest.mark.slow), "squeeze"])
def test_the_distance_and_its_gradient_are_the_packages(net: str, tmp_path: Path) -> None:
    layers = features(net)
    save_file(named(layers), tmp_path / "trunk.safetensors")
    ours = LPIPS(net=net, weights=tmp_path / "trunk.safetensors")
    theirs = package(net, layers)
    x, x_adv = images(0), images(1).requires_grad_()
    expected, got = theirs(x, x_adv).flatten(), distance(ours, x, x_adv)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert expected.min() > 1e-4  # else the line above would say nothing
    (wanted,) = torch.autograd.grad(expected.sum(), x_adv)
    (came,) = torch.autograd.grad(got.sum(), x_adv)
    # float32 sums in another order, over gradients of this size
    torch.testing.assert_close(came, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-3)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no published weights in ../shared/data/lpips")
class TestPublishedWeights:
    @pytest.mark.parametrize(("name", "expected"), [("p0", 0.72188), ("p1", 0.13757)])
    def test_the_examples_have_their_published_distances(self, name: str, expected: float) -> None:
        spec = LPIPS(weights=SHARED / "lpips_alex.npz")
        d = distance(spec, self.example("ref"), self.example(name))
        assert d.item() == pytest.approx(expected, abs=1e-5)

    def test_the_files_heads_are_those_that_the_package_brings(self) -> None:
        arrays = np.load(SHARED / "lpips_alex.npz", allow_pickle=False)
        theirs = package("alex", features("alex")).state_dict()
        for i in range(5):
            name = f"lin{i}.model.1.weight"
            np.testing.assert_array_equal(arrays[name], theirs[name].numpy())

    def example(self, name: str) -> Tensor:
        pixels = np.array(Image.open(SHARED / f"ex_{name}.png").convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


@few
@given(seed=st.integers(0, 2**31), size=st.integers(31, 40), channels=st.sampled_from([1, 3]))
def test_lpips_is_a_symmetric_distance(spec: LPIPS, seed: int, size: int, channels: int) -> None:
    x, x_adv = images(seed, 2, channels, size), images(seed + 1, 2, channels, size)
    d = distance(spec, x, x_adv)
    assert d.shape == (2,)
    assert (d > 0).all()
    assert (distance(spec, x, x) == 0).all()
    torch.testing.assert_close(distance(spec, x_adv, x), d)


@few
@given(seed=st.integers(0, 2**31))
def test_the_gradient_is_zero_at_the_clean_images(spec: LPIPS, seed: int) -> None:
    x = images(seed)
    x_adv = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distance(spec, x, x_adv).sum(), x_adv)
    assert (gradient == 0).all()


def test_features_that_are_all_zero_have_a_zero_gradient(
    alex: nn.Sequential, tmp_path: Path
) -> None:
    save_file({k: torch.zeros_like(w) for k, w in named(alex).items()}, tmp_path / "0.safetensors")
    x_adv = images(1).requires_grad_()
    d = distance(LPIPS(weights=tmp_path / "0.safetensors"), images(0), x_adv)
    (gradient,) = torch.autograd.grad(d.sum(), x_adv)
    assert (d == 0).all()
    assert (gradient == 0).all()


@few
@given(seed=st.integers(0, 2**31), n=st.integers(2, 5))
def test_an_images_distance_does_not_depend_on_its_batch(spec: LPIPS, seed: int, n: int) -> None:
    x, x_adv = images(seed, n), images(seed + 1, n)
    alone = torch.cat([distance(spec, x[i : i + 1], x_adv[i : i + 1]) for i in range(n)])
    torch.testing.assert_close(distance(spec, x, x_adv), alone, atol=1e-6, rtol=1e-4)


@few
@given(seed=st.integers(0, 2**31))
def test_grey_images_are_taken_as_three_equal_channels(spec: LPIPS, seed: int) -> None:
    x, x_adv = images(seed, channels=1), images(seed + 1, channels=1)
    colour = distance(spec, x.expand(-1, 3, -1, -1), x_adv.expand(-1, 3, -1, -1))
    assert torch.equal(distance(spec, x, x_adv), colour)


@few
@given(seed=st.integers(0, 2**31), low=st.floats(-2, 1), span=st.floats(0.5, 4))
def test_the_distance_does_not_depend_on_the_bounds(
    spec: LPIPS, seed: int, low: float, span: float
) -> None:
    bounds = Bounds(low, low + span)
    x, x_adv = images(seed), images(seed + 1)
    moved = [bounds.from_unit(INSIDE.to_unit(t)) for t in (x, x_adv)]
    expected = distance(spec, x, x_adv)
    torch.testing.assert_close(distance(spec, *moved, bounds), expected, atol=1e-5, rtol=1e-3)


def test_the_clean_images_features_are_computed_once(spec: LPIPS) -> None:
    x = images(0)
    recorded: list[Tensor] = []
    first = network(spec, CPU, x.dtype).slices[0]
    hook = first.register_forward_hook(lambda layer, args, out: recorded.append(args[0].clone()))
    try:
        measure = spec.bind(None, x, INSIDE)  # type: ignore[arg-type]
        assert len(recorded) == 1
        for seed in (1, 2, 3):
            measure(images(seed))
    finally:
        hook.remove()
    assert len(recorded) == 4
    assert not any(torch.equal(recorded[0], later) for later in recorded[1:])


def test_the_network_is_built_once_and_frozen(spec: LPIPS) -> None:
    x_adv = images(1).requires_grad_()
    distance(spec, images(0), x_adv).sum().backward()
    built = network(spec, CPU, torch.float32)
    assert built is network(LPIPS(weights=spec.weights), CPU, torch.float32)
    assert not any(layer.training for layer in built.modules())
    assert all(not w.requires_grad and w.grad is None for w in built.parameters())
    assert len(list(built.parameters())) == 15


def test_building_draws_from_no_global_generator(spec: LPIPS) -> None:
    network.cache_clear()
    before = torch.get_rng_state()
    network(spec, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_printed(spec: LPIPS, capsys: pytest.CaptureFixture[str]) -> None:
    network.cache_clear()
    network(spec, CPU, torch.float32)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", ["pth", "npz", "safetensors"])
def test_every_kind_of_weights_file_gives_the_same_distance(
    spec: LPIPS, alex: nn.Sequential, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"trunk.{suffix}"
    weights = {**named(alex), "classifier.1.weight": torch.zeros(2, 2)}  # as torchvision's files
    match suffix:
        case "pth":
            torch.save(weights, path)
        case "npz":
            np.savez(path, **{name: w.numpy() for name, w in weights.items()})
        case _:
            save_file(weights, path)
    x, x_adv = images(0), images(1)
    assert torch.equal(distance(LPIPS(weights=path), x, x_adv), distance(spec, x, x_adv))


def test_heads_in_the_file_take_the_place_of_the_packages(
    spec: LPIPS, alex: nn.Sequential, tmp_path: Path
) -> None:
    heads = {
        f"lin{i}.model.1.weight": torch.zeros(1, width, 1, 1)
        for i, width in enumerate([64, 192, 384, 256, 256])
    }
    save_file({**named(alex), **heads}, tmp_path / "headless.safetensors")
    assert (distance(spec, images(0), images(1)) > 0).all()
    without = LPIPS(weights=tmp_path / "headless.safetensors")
    assert (distance(without, images(0), images(1)) == 0).all()


def test_torchvisions_cache_is_used(alex: nn.Sequential, spec: LPIPS, no_cache: Path) -> None:
    no_cache.mkdir(parents=True)
    torch.save(named(alex), no_cache / "alexnet-owt-7be5be79.pth")
    x, x_adv = images(0), images(1)
    assert torch.equal(distance(LPIPS(), x, x_adv), distance(spec, x, x_adv))


@pytest.mark.usefixtures("no_cache")
def test_without_weights_the_error_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a download nobody asked for")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ConfigError) as raised:
        distance(LPIPS(), images(0), images(1))
    for word in ("alexnet-owt-7be5be79.pth", "download", "weights", "`none`", "l2", "logits"):
        assert word in str(raised.value)


@pytest.mark.usefixtures("no_cache")
def test_a_requested_download_is_checked_by_its_hash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requested = []

    def download(url: str, _: str, hash_prefix: str, **__: object) -> None:
        requested.append((url, hash_prefix))
        raise OSError("no network in tests")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(DataError, match="download failed"):
        distance(LPIPS(download=True), images(0), images(1))
    assert requested == [
        ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79")
    ]


def broken(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    name = "features.3.weight"
    match how:
        case "missing":
            del weights[name]
        case "shape":
            weights[name] = weights[name][:, :, :3, :3].contiguous()
        case "nan":
            weights[name][0, 0, 0, 0] = float("nan")
        case "unknown":
            weights["features.12.weight"] = torch.zeros(1)
    return weights


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"missing features\.3\.weight"),
        ("shape", r"features\.3\.weight is \[192, 64, 3, 3\], .* expects \[192, 64, 5, 5\]"),
        ("nan", r"features\.3\.weight holds NaN"),
        ("unknown", r"features\.12\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    alex: nn.Sequential, tmp_path: Path, how: str, message: str
) -> None:
    path = tmp_path / "trunk.safetensors"
    save_file(broken(named(alex), how), path)
    with pytest.raises(DataError, match=message) as raised:
        distance(LPIPS(weights=path), images(0), images(1))
    assert str(path) in str(raised.value)


def test_another_nets_weights_are_refused(spec: LPIPS) -> None:
    with pytest.raises(DataError, match="squeeze"):
        distance(LPIPS(net="squeeze", weights=spec.weights), images(0), images(1))


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.npz", "cut.pth", "weights.txt"])
def test_a_file_that_is_no_weights_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 not weights at all")
    with pytest.raises(DataError, match=name):
        distance(LPIPS(weights=tmp_path / name), images(0), images(1))


def test_a_missing_weights_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.pth"):
        distance(LPIPS(weights=tmp_path / "nowhere.pth"), images(0), images(1))


class SideEffect:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_weights_file_does_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"features.0.weight": SideEffect(ran)}, tmp_path / "trunk.pth")
    np.savez(tmp_path / "trunk.npz", **{"features.0.weight": np.array(SideEffect(ran), object)})
    for name in ("trunk.pth", "trunk.npz"):
        with pytest.raises(DataError, match=name):
            distance(LPIPS(weights=tmp_path / name), images(0), images(1))
    assert not ran.exists()
    pickle.loads(pickle.dumps(SideEffect(ran)))
    assert ran.exists()  # the trap was live


def test_images_that_do_not_fit_are_refused(spec: LPIPS) -> None:
    with pytest.raises(MisfitError, match=r"31 px, got 30 x 30"):
        distance(spec, images(0, size=30), images(1, size=30))
    with pytest.raises(MisfitError, match="2 channels"):
        distance(spec, images(0, channels=2), images(1, channels=2))
    smallest = images(0, size=LPIPS.min_size)
    assert distance(spec, smallest, smallest + 0.1).isfinite().all()
