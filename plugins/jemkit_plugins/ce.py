"""Standard training: the cross-entropy of clean images."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Generator

from jemkit import Backbone, Batch, Objective, Options, Stream, Table, Terms, hookimpl, watched


class CE(Options):
    """-log p(y | x)."""

    needs_density: ClassVar[bool] = False

    @property
    def streams(self) -> tuple[Stream, ...]:
        return ("x",)

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> None:
        return None

    def loss(self, backbone: Backbone, batch: Batch, draws: None) -> Terms:
        scores = backbone.scores({"x": batch.x})
        term = F.cross_entropy(scores["x"].logits, batch.y)
        return Terms.weighted({"p(y|x)": (1.0, term)}, watched(scores, batch.y))


@hookimpl
def jemkit_objectives() -> Mapping[str, type[Objective[Any]]]:
    return {"ce": CE}


@hookimpl
def jemkit_recipes() -> Mapping[str, Table]:
    return {"objective/ce": {"run": {"select": "accuracy"}}}
