"""In whose features samples are judged, and what the figures are called then."""

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_tools import (
    CPU,
    TASK,
    MeanPixels,
    context,
    images,
    judged,
    subject,
)
from strategies import uniform
from torch import Tensor, nn
from toys import REGISTRY, gen

from jemkit import PixelModel
from jemkit.config.eval_settings import evaluators_of, settings_of
from jemkit.errors import ConfigError, DataError
from jemkit.metrics.evaluator import Unmeasurable
from jemkit.metrics.plots import to_bytes
from jemkit.models.energy import EnergyModel, Scores
from jemkit.models.networks import seeded_init
from jemkit.runtime.torchvision_compat import torchvision
from jemkit_plugins.generation.features import WEIGHTS as INCEPTION_FILE
from jemkit_plugins.generation.features import (
    inception,
    inception_file,
    of_module,
    own,
)

# whose features, and what that is called


@pytest.fixture
def no_cache(tmp_path: Path) -> Any:
    """A torch cache of its own, with nothing in it."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


@pytest.mark.usefixtures("no_cache")
def test_without_inception_the_models_own_features_stand_in_under_another_name() -> None:
    ctx = context()
    figures = judged(ctx, features=None)
    assert set(figures) == {"fd-self", "kd-self", "precision-self", "recall-self"}
    messages = " ".join(ctx.notes.warnings)
    assert INCEPTION_FILE in messages
    assert "not downloaded automatically" in messages


@pytest.mark.usefixtures("no_cache")
def test_inception_that_is_requested_and_missing_is_one_clear_message(tmp_path: Path) -> None:
    options = {"generation": {"inception": str(tmp_path / "nowhere.pth")}}
    requested = settings_of({"only": ("generation",), "options": options})
    with pytest.raises(ConfigError, match=r"nowhere\.pth is missing") as raised:
        evaluators_of(requested, REGISTRY)  # before any attack runs
    for word in ("FID", "https://", INCEPTION_FILE, "generation.inception"):
        assert word in str(raised.value)


def test_own_features_are_the_networks_in_the_models_range() -> None:
    model, x = subject(), images("train")
    result = own(model)
    assert result is not None
    with torch.no_grad():
        expected = model.model.network(TASK.bounds.from_unit(x.unit()))
        assert torch.equal(result.extract(x.x).features, expected)


def test_no_other_network_may_call_itself_inception() -> None:
    with pytest.raises(ConfigError, match="another name"):
        of_module(MeanPixels(), "inception")


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names and of the shapes of torch-fidelity's InceptionV3."""
    torchvision()
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as package

    class Empty(package.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            return None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with seeded_init(gen()):
        built = Empty("any", ["2048"], feature_extractor_weights_path=nothing)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(built.state_dict(), path)
    return path


def test_inceptions_features_are_torch_fidelitys_own(inception_weights: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with seeded_init(gen(1)):
        package = FeatureExtractorInceptionV3(
            "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
        )
    x = to_bytes(uniform(0, 2, 3, 8, 8, low=0))
    with torch.no_grad():
        features, logits = package(x)
        extracted = inception(inception_weights, CPU).extract(x)
    assert torch.equal(extracted.features, features)
    assert extracted.logits is not None
    assert torch.equal(extracted.logits, logits)
    assert extracted.features.shape == (2, 2048)


def pixels_as_features(_: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits in place of Inception's, fewer and without its cost."""
    pixels = x.float().flatten(1).repeat(1, 6) / 255
    return pixels[:, :64], pixels[:, :1008]


def test_in_inceptions_features_the_figures_have_the_names_that_papers_use(
    inception_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a download nobody asked for")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(FeatureExtractorInceptionV3, "forward", pixels_as_features)
    before = torch.get_rng_state()
    figures = judged(features=None, inception=inception_weights, n=16, max_reference=16)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(figures) == {"fid", "kid", "precision", "recall", "is"}
    assert figures["is"].protocol["splits"] == 10
    assert 1 - 1e-9 <= figures["is"].value <= 1008
    card = figures["fid"].protocol["features"]
    assert card["extractor"] == "torch-fidelity's InceptionV3"
    assert len(card["sha256"]) == 64


def test_weights_in_torchs_cache_are_used(no_cache: Path) -> None:
    no_cache.mkdir(parents=True)
    (no_cache / INCEPTION_FILE).write_bytes(b"weights")
    assert inception_file(None) == no_cache / INCEPTION_FILE


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "there.pth").write_bytes(b"weights")
    with pytest.raises(ConfigError, match=r"\[metrics\]"):
        judged(features=None, inception=tmp_path / "there.pth")


@pytest.mark.parametrize("how", ["missing", "shape", "nan", "cut", "code"])
def test_weights_that_are_not_inceptions_are_refused_by_name(
    inception_weights: Path, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "other.pth"
    weights: dict[str, Any] = torch.load(inception_weights, weights_only=True)
    match how:
        case "missing":
            del weights["fc.weight"]
        case "shape":
            weights["fc.weight"] = weights["fc.weight"][:1000]
        case "nan":
            weights["fc.bias"][0] = float("nan")
        case "code":
            weights["fc.bias"] = replace  # a function: unpickling it would import a module
    torch.save(weights, path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"other\.pth"):
        inception(path, CPU)


class Bare(EnergyModel):
    """A linear classifier of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Scores:
        return self.read(x.flatten(1))

    def read(self, features: Tensor) -> Scores:
        logits = self.layer(features)
        return Scores(logits, -logits.logsumexp(dim=1))


@pytest.mark.usefixtures("no_cache")
def test_an_energy_model_without_a_network_has_no_features_of_its_own() -> None:
    bare = PixelModel(Bare(), TASK.bounds, subject().density)
    with pytest.raises(Unmeasurable, match="no network"):
        judged(model=bare, features=None)
    assert judged(model=bare)["fd-pixels"].n == 40
