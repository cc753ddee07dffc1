"""Inception's body: its weights are read as data, and its images are scaled as FID's are."""

import zipfile
from pathlib import Path

import pytest
import torch

from jemkit.errors import DataError
from jemkit.runtime.torchvision_compat import torchvision
from jemkit_plugins.generation import features
from jemkit_plugins.generation.features import BODY, KNOWN, PACKAGE, inception, inception_file
from jemkit_plugins.generation.inception_body import InceptionBody, is_archive, load

torchvision()  # first: torch-fidelity imports it on its own
pytest.importorskip("torch_fidelity")
CPU = torch.device("cpu")


def tensors(body: InceptionBody) -> list[torch.Tensor]:
    """Random values for each tensor of the file; variances are positive."""
    rng = torch.Generator().manual_seed(0)
    values = []
    for conv, norm in body.convolutions():
        fan = conv.weight[0].numel()
        values.append(torch.randn(conv.weight.shape, generator=rng) * (2 / fan) ** 0.5)
        values += [torch.randn(norm.num_features, generator=rng) / 9 for _ in range(2)]
        values.append(1 + torch.rand(norm.num_features, generator=rng))
    return values


def archive(path: Path, values: list[torch.Tensor], code: bytes = b"raise SystemExit") -> Path:
    """A TorchScript archive as far as it is read; its entries are not in order."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("made/code/__torch__/net.py", code)
        file.writestr("made/data.pkl", b"cos\nsystem\n(S'exit 1'\ntR.")
        for i, value in reversed(list(enumerate(values))):
            file.writestr(f"made/data/{i}", value.numpy().astype("<f4").tobytes())
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    values = tensors(InceptionBody())
    return archive(tmp_path_factory.mktemp("body") / "made.pt", values), values


def test_every_tensor_of_the_file_is_in_its_place(made: tuple[Path, list[torch.Tensor]]) -> None:
    path, values = made
    assert is_archive(path)
    body = load(path)
    layers = list(body.convolutions())
    assert len(values) == 4 * len(layers) == 376
    for at, (conv, norm) in enumerate(layers):
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        loaded = [conv.weight, norm.bias, mean, variance]
        for one, other in zip(loaded, values[4 * at : 4 * at + 4], strict=True):
            assert torch.equal(one, other)
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert norm.eps == 0.001
    assert not body.training


def test_features_are_finite_and_each_images_own(made: tuple[Path, list[torch.Tensor]]) -> None:
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8, generator=rng)
    recorded = inception(made[0], CPU)
    together = recorded.extract(images)
    assert together.features.shape == (3, 2048)
    assert together.features.isfinite().all()
    assert together.logits is None
    alone = recorded.extract(images[1:2]).features
    assert torch.allclose(together.features[1:2], alone, rtol=1e-4, atol=1e-5)
    assert recorded.is_inception
    assert recorded.card["weights"] == "unknown"


def test_images_are_resized_without_antialiasing_to_the_range_of_inception() -> None:
    body = InceptionBody().eval()
    inputs = []
    body.layers = torch.nn.Sequential(body.layers[0])
    body.layers[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    image = torch.tensor([[0, 255], [51, 204]], dtype=torch.uint8).expand(1, 3, 2, 2)
    with torch.no_grad():
        body(image)
    (x,) = inputs
    assert x.shape == (1, 3, 299, 299)
    corners = x[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.tolist() == pytest.approx([-1, 1, -0.6, 0.6])
    assert float(x[0, 0, 149, 149]) == pytest.approx(0.0, abs=1e-6)  # the mean of the four


@pytest.mark.parametrize("fault", ["fewer", "shape", "nan", "cut"])
def test_other_files_are_refused(
    made: tuple[Path, list[torch.Tensor]], tmp_path: Path, fault: str
) -> None:
    values = list(made[1])
    if fault == "fewer":
        values.pop()
    elif fault == "shape":
        values[-1] = values[-1][:-1]
    elif fault == "nan":
        values[-1] = torch.full_like(values[-1], torch.nan)
    path = archive(tmp_path / "other.pt", values)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[: -(2**16)])
        assert not is_archive(path)
    with pytest.raises(DataError, match=r"other\.pt"):
        inception(path, CPU)


def test_a_file_of_tensors_is_no_archive(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    assert not is_archive(tmp_path / "weights.pth")
    (tmp_path / "text").write_text("none")
    assert not is_archive(tmp_path / "text")


def test_weights_of_an_installed_package_are_used_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / BODY).write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "none"))
    assert inception_file(None) == package / BODY
    named = tmp_path / "mine.pt"
    named.write_bytes(b"mine")
    assert inception_file(named) == named


def test_known_weights_are_labelled_by_their_hash(
    made: tuple[Path, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = next(start for start, graph in KNOWN.items() if graph.endswith("body"))
    monkeypatch.setattr(features, "file_hash", lambda _: start.ljust(64, "0"))
    assert inception(made[0], CPU).card["weights"] == "the graph of 2015, body"
