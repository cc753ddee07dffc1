"""Attacks on randomised models, and on models that purify their input."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    Criterion, CriterionFn, MisfitError, ModelAttack, Perturb, PGDAttack, PixelModel, Threat,
    hookimpl,
)  # fmt: skip
from jemkit.attacks.purification import Refined, Slope


class EOT(PGDAttack):
    """PGD on a gradient averaged over draws of the model's noise (Athalye et al., ICML 2018b).

    If the model purifies its input, the gradient is taken through every step of the chain. Any
    other model is evaluated `samples` times.
    """

    slope: ClassVar[Slope] = "exact"

    steps: int = Field(20, ge=0)  # number of gradient steps
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius
    samples: int = Field(10, ge=1)  # passes per gradient; one if nothing is random

    @property
    def label(self) -> str:
        return f"eot{self.steps}"

    def criterion(self, subject: PixelModel, x: Tensor, y: Tensor, rng: Generator) -> CriterionFn:
        """Losses and logits are means over the passes, as is the gradient of the loss."""
        passes = 1 if isinstance(subject, Refined) and not subject.random else self.samples

        def evaluated(z: Tensor) -> Criterion:
            """Linear in z with the mean gradient, so that only one pass's graph is in memory."""
            slope, losses, answers = torch.zeros_like(z), [], []
            for _ in range(passes):
                logits = self._logits(subject, z, rng)
                loss = F.cross_entropy(logits, y, reduction="none")
                if z.requires_grad:
                    slope += torch.autograd.grad(loss.sum(), z)[0] / passes
                losses.append(loss.detach())
                answers.append(logits.detach())
            wrong = torch.stack(answers).mean(0).argmax(1) != y
            return Criterion((slope * z).flatten(1).sum(1), wrong, rank=torch.stack(losses).mean(0))

        return evaluated

    def _logits(self, subject: PixelModel, z: Tensor, rng: Generator) -> Tensor:
        if isinstance(subject, Refined):
            return subject.scores(z, rng, self.slope).logits
        return subject(z)  # type: ignore[no-any-return]

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        return {
            **super().card(threat, n_classes),
            "gradient": f"{self.slope.replace('_', '-')}, mean over passes",
            "passes": f"{self.samples}; 1 where a refinement draws no noise",
            "kept": "the worst of all steps by logits and loss averaged over the passes",
        }


class BPDA(EOT):
    """PGD that treats purification as the identity in the backward pass (Athalye et al., 2018a).

    The forward pass purifies fully; the gradient at the purified image is used as that at x. It is
    averaged over the noise as in `eot`.
    """

    slope: ClassVar[Slope] = "straight_through"

    @property
    def label(self) -> str:
        return f"bpda{self.steps}"

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        if not isinstance(subject, Refined):
            raise MisfitError(
                "bpda is for models that purify their input, and this model does not: use pgd, "
                "or eot if its outputs are random"
            )
        return super().bind(subject, threat)


@hookimpl
def jemkit_attacks() -> Mapping[str, type[ModelAttack]]:
    return {"eot": EOT, "bpda": BPDA}
