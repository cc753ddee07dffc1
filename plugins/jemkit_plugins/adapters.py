"""Networks of torchvision and timm, by the names that these give them."""

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from jemkit import vision
from jemkit.energy import Network
from jemkit.errors import ConfigError
from jemkit.hookspecs import hookimpl
from jemkit.networks import Adapted, NetworkSpec, Shape
from jemkit.options import Options, nearest


class Torchvision(Options):
    """A classification network of torchvision without its last linear layer, `torchvision-NAME`."""

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: str

    def build(self, shape: Shape) -> Network:
        models = vision.torchvision().models
        names = models.list_models(module=models)
        if self.model not in names:
            raise ConfigError(
                f"torchvision has no model {self.model!r}{nearest(self.model, names)}"
            )
        _three_channels(shape, f"torchvision's {self.model}")
        module = models.get_model(self.model, weights=None)
        return Adapted(module, _without_head(module, self.model))


class Timm(Options):
    """A network of timm that gives features, `timm-NAME`; timm is not installed with jemkit."""

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: str

    def build(self, shape: Shape) -> Network:
        vision.torchvision()
        try:
            import timm
        except ImportError:
            raise ConfigError(
                "the network `timm` needs the package timm: pip install timm"
            ) from None
        if not timm.is_model(self.model):
            near = nearest(self.model, timm.list_models())
            raise ConfigError(f"timm has no model {self.model!r}{near}")
        module = timm.create_model(self.model, pretrained=False, num_classes=0, in_chans=shape[0])
        return Adapted(module, int(module.num_features))


def _three_channels(shape: Shape, what: str) -> None:
    if shape[0] != 3:
        raise ConfigError(f"{what} takes images of 3 channels; these have {shape[0]}")


def _without_head(module: nn.Module, name: str) -> int:
    """Take off the last linear layer; give back how many features came into it."""
    linear = [(path, m) for path, m in module.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ConfigError(f"torchvision's {name} ends in no linear layer that could be taken off")
    path, last = linear[-1]
    parent, _, attribute = path.rpartition(".")
    setattr(module.get_submodule(parent), attribute, nn.Identity())
    return last.in_features


@hookimpl
def jemkit_networks() -> Mapping[str, type[NetworkSpec]]:
    return {"torchvision": Torchvision, "timm": Timm}
