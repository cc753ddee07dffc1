"""Networks of torchvision and timm, by their names in these packages."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from jemkit import (
    Adapted, ConfigError, MisfitError, Network, NetworkSpec, Options, Shape, hookimpl,
)  # fmt: skip
from jemkit.runtime import torchvision_compat  # fmt: skip
from jemkit.models.networks import check_features
from jemkit.options import nearest

CLASSES = 1000
"""The number of ImageNet classes, for which torchvision builds its networks."""

Layer = nn.Linear | nn.Conv2d


class Torchvision(Options):
    """A classification network of torchvision without its last linear layer, `torchvision-NAME`."""

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: str  # torchvision's name of it

    def build(self, shape: Shape) -> Network:
        models = torchvision_compat.torchvision().models
        names = models.list_models(module=models)
        if self.model not in names:
            raise ConfigError(
                f"torchvision has no model {self.model!r}{nearest(self.model, names)}"
            )
        _three_channels(shape, f"torchvision's {self.model}")
        what = f"torchvision's {self.model}"
        with _shape_errors(what, shape):
            module = models.get_model(self.model, weights=None, **_options(self.model, shape[1]))
        network = Adapted(module, _without_head(module, what))
        with _shape_errors(what, shape):
            check_features(network, shape)
        return network


class Timm(Options):
    """A network of timm without its classifier, `timm-NAME`; timm is not installed with jemkit."""

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: str  # timm's name of it

    def build(self, shape: Shape) -> Network:
        torchvision_compat.torchvision()
        try:
            import timm
        except ImportError:
            raise ConfigError(
                "the network `timm` needs the package timm: pip install timm"
            ) from None
        if not timm.is_model(self.model):
            near = nearest(self.model, timm.list_models())
            raise ConfigError(f"timm has no model {self.model!r}{near}")
        with _shape_errors(f"timm's {self.model}", shape):
            return _timm(timm.create_model, self.model, shape)


def _three_channels(shape: Shape, what: str) -> None:
    if shape[0] != 3:
        raise ConfigError(f"{what} takes images of 3 channels; these have {shape[0]}")


def _options(model: str, px: int) -> dict[str, Any]:
    """Arguments of a torchvision builder for a single output and images of this size."""
    if model in ("googlenet", "inception_v3"):  # with auxiliary heads they return a tuple
        return {"aux_logits": False, "transform_input": False, "init_weights": True}
    if model.startswith("vit_"):
        return {"image_size": px}
    return {"input_size": (px, px)} if model.startswith("maxvit") else {}


def _timm(create: Callable[..., nn.Module], model: str, shape: Shape) -> Network:
    """Arguments with the image size, if the network depends on it as transformers do."""
    fixed: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": shape[0]}
    try:
        module = create(model, **fixed, img_size=shape[1])
    except TypeError:
        module = create(model, **fixed)
    network = Adapted(module, int(module.num_features))  # type: ignore[arg-type]
    try:
        check_features(network, shape)
    except MisfitError:  # `num_features` is the trunk's, and a layer follows before the head
        network = Adapted(module, int(getattr(module, "head_hidden_size", network.width)))
        check_features(network, shape)
    return network


@contextmanager
def _shape_errors(what: str, shape: Shape) -> Iterator[None]:
    """Any exception that a network raises for images of this size, as one message."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{what} does not take images of {' x '.join(map(str, shape))}: {why}. Choose another "
            "network, or images of another size"
        ) from error


def _without_head(module: nn.Module, what: str) -> int:
    """Remove the final layer, that of the ImageNet classes; return the number of its inputs."""
    layers = [(path, m) for path, m in module.named_modules() if isinstance(m, Layer)]
    path, last = layers[-1] if layers else ("", None)
    classes = getattr(last, "out_features", getattr(last, "out_channels", 0))
    if last is None or classes != CLASSES:
        raise ConfigError(f"{what} has no final layer of {CLASSES} classes to remove")
    parent, _, attribute = path.rpartition(".")
    setattr(module.get_submodule(parent), attribute, nn.Identity())
    return int(last.weight.shape[1])


@hookimpl
def jemkit_networks() -> Mapping[str, type[NetworkSpec]]:
    return {"torchvision": Torchvision, "timm": Timm}
