"""AutoAttack's parts (Croce and Hein 2020, 2021) as stages, computed by pyautoattack."""

import importlib.metadata
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from jemkit.attacks.base import Norm, Perturb, Threat
from jemkit.attacks.pgd import margin
from jemkit.attacks.pixel_model import PixelModel
from jemkit.data import Shape
from jemkit.errors import DataError, MisfitError
from jemkit.runtime.modes import preserved_random_state

Part = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]

TARGETS = 9  # classes that a targeted part aims at, the likeliest wrong ones; CIFAR-10 has no more
QUERIES = 5000  # of Square within AutoAttack: the first half of its authors' schedule of 10,000

LOG = logging.getLogger(__name__)
LOG.addHandler(logging.NullHandler())  # pyautoattack's warnings are for whoever listens


@dataclass(frozen=True)
class Stage:
    """One part with its settings.

    Where a model has too few classes for a loss or for all targets, `departures` says what takes
    their place: the margin of the logits for DLR below 3 classes and for its targeted form
    below 4, since they divide by a difference that needs so many.
    """

    name: Part
    steps: int = 100  # of Square: its queries
    restarts: int = 1
    targets: int = TARGETS
    eot: int = 1  # gradients that a step averages
    widened: bool = False  # whether APGD begins in balls 3 and 2 times as wide, as L1 needs

    def bind(self, subject: PixelModel, threat: Threat) -> Perturb:
        """The stage on a model: it begins from its generator's seed, as pyautoattack does."""

        def perturb(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
            logits = _Logits(subject)
            with preserved_random_state(), torch.no_grad():
                n_classes = logits(x[:1]).shape[1]
                part = self._part(logits, threat, rng.initial_seed(), n_classes)
                x_adv: Tensor = part.perturb(x.contiguous(), y)
            if not logits.finite:
                raise DataError(
                    f"the model's logits held NaN or inf on images that {self.name} tried: it has "
                    "no accuracy under attack. Look for an overflow in the model"
                )
            return x_adv

        return perturb

    def card(self, n_classes: int) -> dict[str, Any]:
        """Its settings as they are with so many classes."""
        about: dict[str, Any] = {"queries" if self.name == "square" else "steps": self.steps}
        about["restarts"] = self.restarts
        if self.name.startswith("apgd"):
            about |= {"eot": self.eot, "loss": self._loss(n_classes)}
        if self._rescaled:
            about["schedule"] = f"its authors', over {self.steps} queries"
        if self._targeted:
            about["targets"] = self._aims(n_classes)
        return about | ({"radii": "3, 2, 1 times the radius"} if self.widened else {})

    def check_images(self, shape: Shape, norm: Norm) -> None:
        """MisfitError if Square cannot begin on images [C, H, W] in this norm."""
        _, height, width = shape
        if self.name == "square" and not squares_fit(height, width, norm):
            raise MisfitError(
                f"{package()}'s Square fails on images of {height} x {width} px in {norm}: its "
                "first squares do not fit in. Use other attacks, such as pgd and apgd, or Linf"
            )

    def departures(self, n_classes: int) -> list[str]:
        """What is not as published, for want of classes."""
        reasons = []
        if self._targeted and n_classes - 1 < self.targets:
            aims = self._aims(n_classes)
            reasons.append(f"{n_classes} classes leave {aims} of {self.targets} targets")
        if "margin" in self._loss(n_classes):
            reasons.append(
                f"{self.name} goes up the margin: DLR is undefined at {n_classes} classes"
            )
        return reasons

    @property
    def _targeted(self) -> bool:
        return self.name.endswith("-t")

    @property
    def _rescaled(self) -> bool:
        """Whether Square's windows shrink over its own number of queries, as its authors' do."""
        return self.name == "square" and self.steps != QUERIES

    def _aims(self, n_classes: int) -> int:
        return min(self.targets, n_classes - 1)

    def _loss(self, n_classes: int) -> str:
        if self.name == "apgd-t":
            return "targeted dlr" if n_classes >= 4 else "targeted margin"
        if self.name == "apgd-dlr":
            return "dlr" if n_classes >= 3 else "margin"
        return "ce"

    def _part(self, logits: "_Logits", threat: Threat, seed: int, n_classes: int) -> Any:
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.fab_pt import FABAttack_PT
        from pyautoattack.square import SquareAttack

        usual: dict[str, Any] = {
            "norm": threat.norm, "eps": threat.eps, "seed": seed, "n_restarts": self.restarts
        }  # fmt: skip
        ascent = {"n_iter": self.steps, "eot_iter": self.eot, "use_largereps": self.widened}
        if self.name == "square":
            return SquareAttack(logits, n_queries=self.steps, resc_schedule=self._rescaled, **usual)
        if self.name in ("fab", "fab-t"):
            aims = {"targeted": self._targeted, "n_target_classes": self._aims(n_classes)}
            return FABAttack_PT(logits, n_iter=self.steps, **aims, **usual)
        loss = self._loss(n_classes)
        if self.name == "apgd-t":
            aim = {"n_target_classes": self._aims(n_classes), "logger": LOG}
            part = APGDAttack_targeted(logits, **aim, **ascent, **usual)
            if "margin" in loss:
                part.dlr_loss_targeted = lambda z, y: _at(z, part.y_target) - _at(z, y)
            return part
        name = "ce" if loss == "ce" else "dlr"
        part = APGDAttack(logits, loss=name, logger=LOG, **ascent, **usual)
        if "margin" in loss:
            part.dlr_loss = lambda z, y: -margin(z, y)
        return part


def squares_fit(height: int, width: int, norm: Norm) -> bool:
    """Whether pyautoattack's Square can begin on images of this height and width.

    In L2 and L1 it tiles them with squares of H // 5 pixels, and fails if one crosses the border.
    """
    side = height // 5
    if norm == "Linf" or side == 1:
        return True
    first = (height - 5 * side) // 2
    return side > 0 and all(first + length // side * side <= length for length in (height, width))


def package() -> str:
    """Who computes the parts, for a protocol."""
    return f"pyautoattack {importlib.metadata.version('pyautoattack')}"


class _Logits:
    """A model's logits, and whether all of them were finite; no pass waits for the answer."""

    def __init__(self, subject: PixelModel) -> None:
        self.subject = subject
        self._total: Tensor | float = 0.0  # in float64, which logits that are finite never leave

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = self.subject(x)
        self._total = self._total + logits.detach().sum(dtype=torch.float64)
        return logits.clone()  # Square writes into what it gets

    @property
    def finite(self) -> bool:
        return bool(torch.as_tensor(self._total).isfinite())


def _at(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).squeeze(1)
