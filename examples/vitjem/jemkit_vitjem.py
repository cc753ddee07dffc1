"""ViT-JEM: a JEM on a vision transformer of timm, whose energy has a learnt temperature."""

from typing import ClassVar

from jemkit import (
    SGLD, Adapted, ConfigError, EnergyPart, JEMVariant, LogSumExpEnergy, Network, NetworkPart,
    Options, SamplerPart, Scores, Shape, Table, hookimpl, torchvision,
)  # fmt: skip
from pydantic import Field
from torch import Tensor, nn, tensor


class ViT(Options):
    """A vision transformer; its features are the mean of its tokens, without a class token."""

    norm: ClassVar[str] = "layer"  # so options that act on batch norm are refused
    dim: int = Field(64, ge=16, multiple_of=16)  # features of a token, 16 for each head
    depth: int = Field(4, ge=1)  # blocks
    patch: int | None = Field(None, ge=1)  # px; None: an eighth of the image, at least 2

    def build(self, shape: Shape) -> Network:
        patch = self.patch or max(2, shape[1] // 8)
        if any(px % patch for px in shape[1:]):
            raise ConfigError(f"patches of {patch} px do not divide images {shape}: set `patch`")
        torchvision()  # timm imports it; this lets one that was built for another torch load
        from timm.models.vision_transformer import VisionTransformer

        sizes = self.dim, self.depth, self.dim // 16
        module = VisionTransformer(shape[1:], patch, shape[0], 0, "avg", *sizes, class_token=False)
        for block in module.blocks:  # repeatable on a GPU, and differentiable twice
            block.attn.fused_attn = False  # type: ignore[union-attr]
        return Adapted(module, self.dim)


class TemperedEnergy(LogSumExpEnergy):
    def read(self, features: Tensor) -> Scores:
        logits, t = self.head(features), self.get_parameter("log_t").exp()
        return Scores(logits, -t * (logits / t).logsumexp(dim=1))


class LearntTemperature(Options):
    """E(x) = -T logsumexp(f(x) / T), where log T is a weight; p(y | x) stays softmax f(x)."""

    temperature: float = Field(1.0, gt=0)  # T before the first update; 1 is JEM's energy

    def build(self, network: Network, n_classes: int) -> TemperedEnergy:
        model = TemperedEnergy(network, n_classes)
        model.register_parameter("log_t", nn.Parameter(tensor(self.temperature).log()))
        return model


class ViTJEM(JEMVariant):
    """A small ViT with a learnt temperature; chains of SGLD with noise, from class Gaussians."""

    network: NetworkPart = ViT()
    energy: EnergyPart = LearntTemperature()
    sampler: SamplerPart = SGLD(step_size=1.0, noise=0.01, clip=1.0)


@hookimpl
def jemkit_networks() -> dict[str, type[ViT]]:
    return {"vitjem": ViT}


@hookimpl
def jemkit_energy_models() -> dict[str, type[LearntTemperature]]:
    return {"vitjem": LearntTemperature}


@hookimpl
def jemkit_backbones() -> dict[str, type[ViTJEM]]:
    return {"vitjem": ViTJEM}


@hookimpl
def jemkit_recipes() -> dict[str, Table]:
    adam = {"use": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    return {"backbone/vitjem": {"backbone": {"network": {"use": "vitjem"}}, "optimizer": adam}}
