"""JEM (Grathwohl et al., ICLR 2020): the backbone, and the objective log p(x) + log p(y | x)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    SGLD, WRN, Backbone, BackboneSpec, Batch, Contrastive, DensityPart, JEMVariant, NetworkPart,
    Objective, Options, SamplerPart, StartPart, Steps, Stream, Terms, Uniform, Views, hookimpl,
    watched,
)  # fmt: skip


class JEM(JEMVariant):
    """A WideResNet without normalisation, 20 steps of SGLD from uniform noise, noisy inputs."""

    network: NetworkPart = WRN(norm="none")
    density: DensityPart = Contrastive(box=False)
    sampler: SamplerPart = SGLD(step_size=1.0, noise=0.01)
    start: StartPart = Uniform()
    steps: Steps = 20  # M: sampler steps of a chain per training step
    views: Views = Views(noise_x=0.03, noise_pos=0.03)


class Draws(NamedTuple):
    """Negatives, and the classes from which they were drawn."""

    x_neg: Tensor | None  # [P, C, H, W]
    y: Tensor | None  # [P]


class JEMObjective(Options):
    """log p(x) + log p(y | x); with conditional negatives log p(x | y) replaces log p(x)."""

    needs_density: ClassVar[bool] = True

    w_px: float = Field(1.0, ge=0)  # weight of log p(x)
    w_pyx: float = Field(1.0, ge=0)  # weight of log p(y | x)
    negatives: Literal["marginal", "conditional"] = "marginal"  # samples of p(x), or of p(x | y)

    def unused(self) -> dict[str, str]:
        return {} if self.w_px else {"negatives": "where w_px is 0"}

    @property
    def conditional(self) -> bool:
        return bool(self.w_px) and self.negatives == "conditional"

    @property
    def streams(self) -> tuple[Stream, ...]:
        density: tuple[Stream, ...] = ("x_pos", "x_neg") if self.w_px else ()
        return ("x", *density) if self.w_pyx else density

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Draws:
        if not self.w_px:
            return Draws(None, None)
        n = len(batch.x_pos)
        y = batch.y[:n] if self.conditional else None
        return Draws(backbone.density.draw(backbone.model, n, rng, y), y)

    def loss(self, backbone: Backbone, batch: Batch, draws: Draws) -> Terms:
        streams: dict[Stream, Tensor] = {"x": batch.x} if self.w_pyx else {}
        if draws.x_neg is not None:
            streams |= {"x_pos": batch.x_pos, "x_neg": draws.x_neg}
        scores = backbone.scores(streams)
        terms: dict[str, tuple[float, Tensor]] = {}
        if draws.x_neg is not None:
            pos, neg = scores["x_pos"], scores["x_neg"]
            e_pos = pos.energy if draws.y is None else pos.joint(draws.y)
            e_neg = neg.energy if draws.y is None else neg.joint(draws.y)
            terms["p(x)"] = (self.w_px, backbone.density.loss(e_pos, e_neg))
        if self.w_pyx:
            terms["p(y|x)"] = (self.w_pyx, F.cross_entropy(scores["x"].logits, batch.y))
        return Terms.weighted(terms, watched(scores, batch.y))


@hookimpl
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    return {"jem": JEM}


@hookimpl
def jemkit_objectives() -> Mapping[str, type[Objective[Any]]]:
    return {"jem": JEMObjective}


@hookimpl
def jemkit_recipes() -> Mapping[str, Mapping[str, Any]]:
    return {
        "backbone/jem": {
            "optimizer": {"use": "adam", "lr": 1e-4, "weight_decay": 0.0},
            "updater": {"use": "plain"},
            "schedule": {"decay": "steps", "at": [0.8, 0.9], "by": 0.3},  # 160 and 180 of 200
            "run": {"epochs": 200, "batch_size": 64},
        },
        "objective/jem": {"run": {"select": "accuracy"}},
    }
