"""Attacks on models whose answer is random, or that refine their input before they classify it."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from jemkit import (
    PGD, Best, MisfitError, ModelAttack, Options, Perturb, PixelModel, Threat, ball_of, hookimpl,
)  # fmt: skip
from jemkit.attacks.purification import Refined

Pass = Callable[[Tensor, Generator], Tensor]
"""x [B, C, H, W] to logits [B, K], with noise from the generator."""


class EOT(Options):
    """PGD on a gradient averaged over draws of the model's noise (Athalye et al., ICML 2018b).

    Where the model refines its input the gradient goes through every step of the chain. Any
    other model is asked `samples` times over.
    """

    everyone: ClassVar[bool] = True

    steps: int = Field(20, ge=0)
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius
    samples: int = Field(10, ge=1)  # passes to a gradient; one where nothing is drawn

    def unused(self) -> dict[str, str]:
        return {} if self.steps else {"step_px": "where steps is 0"}

    @property
    def label(self) -> str:
        return f"eot{self.steps}"

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        if isinstance(subject, Refined):
            passes = self.samples if subject.random else 1
            return averaged(self, passes, lambda x, g: subject.scores(x, g, "exact").logits, threat)
        return averaged(self, self.samples, lambda x, _: subject(x), threat)

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        return card(self, "exact", threat, n_classes)


class BPDA(Options):
    """PGD that goes back through a refinement as if it were the identity (Athalye et al., 2018a).

    The forward pass refines in full; the gradient at the refined image is taken for that at x.
    It is averaged over the noise as in `eot`.
    """

    everyone: ClassVar[bool] = True

    steps: int = Field(20, ge=0)
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius
    samples: int = Field(10, ge=1)  # passes to a gradient; one where nothing is drawn

    def unused(self) -> dict[str, str]:
        return {} if self.steps else {"step_px": "where steps is 0"}

    @property
    def label(self) -> str:
        return f"bpda{self.steps}"

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        if not isinstance(subject, Refined):
            raise MisfitError(
                "bpda goes round a refinement of the input, and this model has none: take pgd, "
                "or eot where its answer is random"
            )
        passes = self.samples if subject.random else 1
        return averaged(
            self, passes, lambda x, g: subject.scores(x, g, "straight_through").logits, threat
        )

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        return card(self, "straight-through", threat, n_classes)


def averaged(attack: EOT | BPDA, passes: int, ask: Pass, threat: Threat) -> Mapping[str, Perturb]:
    """PGD on cross-entropies averaged over passes; wrong is what the averaged logits get wrong."""
    norm = ball_of(threat, attack.label)

    def perturb(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
        best = Best(x)

        def energy(z: Tensor) -> Tensor:
            """Linear in z with the mean slope, so that one pass's graph is in memory at a time."""
            slope, losses, logits = torch.zeros_like(z), [], []
            for _ in range(passes):
                found = ask(z, rng)
                loss = F.cross_entropy(found, y, reduction="none")
                if z.requires_grad:
                    slope += torch.autograd.grad(loss.sum(), z)[0] / passes
                losses.append(loss.detach())
                logits.append(found.detach())
            wrong = torch.stack(logits).mean(0).argmax(1) != y
            best.see(z, torch.stack(losses).mean(0), wrong)
            return -(slope * z).flatten(1).sum(1)

        pgd = PGD(steps=attack.steps, step_px=attack.step_px)
        pgd.climb(energy, x, threat.radius_px, norm, rng)
        return best.x

    return {attack.label: perturb}


def card(attack: EOT | BPDA, slope: str, threat: Threat, n_classes: int) -> dict[str, Any]:
    plain = PGD(steps=attack.steps, step_px=attack.step_px)
    return {
        **plain.card(threat, n_classes),
        "gradient": f"{slope}, mean over passes",
        "passes": f"{attack.samples}; 1 where a refinement draws no noise",
        "kept": "the worst of all steps by logits and loss averaged over the passes",
    }


@hookimpl
def jemkit_attacks() -> Mapping[str, type[ModelAttack]]:
    return {"eot": EOT, "bpda": BPDA}
