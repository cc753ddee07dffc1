"""Threats, balls, and the protocols of attacks."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Generator, Tensor, nn

from jemkit.attacks.pixel_model import UNIT, PixelModel
from jemkit.data import Bounds, Shape
from jemkit.errors import ConfigError, MisfitError
from jemkit.runtime.modes import BatchNormMode, sampling_mode
from jemkit.sampling.kernels import Ball

AttackLoss = Callable[[Tensor], Tensor]
"""x~ [B, C, H, W] to [B]; higher is worse for the classifier."""

Norm = Literal["Linf", "L2", "L1"]
"""The norm of a threat model."""


class Threat(NamedTuple):
    """The threat model: a norm, and a radius in 1/255 of the pixel range."""

    norm: Norm
    radius_px: float

    @property
    def eps(self) -> float:
        """The radius for [0, 1] images."""
        return UNIT.px(self.radius_px)


def radius_of(norm: Norm, given: float | None, usual_px: float, option: str) -> float:
    """The given radius in 1/255, else the data set's default, which exists for the L-inf norm only.

    `option` is the name of the option that sets it. Raises ConfigError if there is no radius.
    """
    if given is not None:
        return float(given)
    if norm != "Linf":
        usual = {"L2": "127.5, which is 0.5", "L1": "3060, which is 12"}[norm]
        raise ConfigError(
            f"the norm {norm} has no default radius: pass one in 1/255 of the pixel range; on "
            f"CIFAR-10 {option} {usual}, is usual"
        )
    return float(usual_px)


def check_width(threat: Threat, pixels: int, option: str) -> None:
    """Reject a radius wider than the whole pixel range of images with so many values."""
    widest = 255 * {"Linf": 1.0, "L2": pixels**0.5, "L1": float(pixels)}[threat.norm]
    if threat.radius_px > widest:
        raise ConfigError(
            f"{option} {threat.radius_px:g} is wider than the whole range, {widest:g} in the norm "
            f"{threat.norm}: a radius is given in 1/255 of the pixel range, so 8 for 8/255"
        )


@runtime_checkable
class InBall(Protocol):
    """A part that perturbs images inside a ball: an attack, or an objective with a threat of its
    own."""

    @property
    def norm(self) -> Norm: ...

    @property
    def radius_px(self) -> float | None:
        """None: the data set's default radius, for L-inf."""


@runtime_checkable
class ForTraining(Protocol):
    """An attack with options that only apply to evaluation."""

    def check_training(self) -> None:
        """Refuse those."""


@runtime_checkable
class HasBatchNormMode(Protocol):
    """An attack that states how batch norm behaves while it runs in training."""

    @property
    def batch_norm(self) -> BatchNormMode: ...


def attack_mode(attack: "Attack", model: nn.Module) -> AbstractContextManager[None]:
    """The model as a training attack uses it: frozen weights, by default in eval mode.

    An objective computes in it what the attack compares with, such as clean logits.
    """
    mode = attack.batch_norm if isinstance(attack, HasBatchNormMode) else "running_stats"
    return sampling_mode(model, mode)


Perturb = Callable[[Tensor, Tensor, Generator], Tensor]
"""x [B, C, H, W] in [0, 1], y [B] and a generator to x~, in the ball and in [0, 1]."""


@runtime_checkable
class Attack(Protocol):
    """Images near x with a high loss; for training and for evaluation."""

    def draw(
        self,
        model: nn.Module,
        loss: AttackLoss,
        x: Tensor,
        rng: Generator,
        *,
        bounds: Bounds,
        radius_px: float,
    ) -> Tensor:
        """x~ [B, C, H, W], detached; `radius_px` applies if the attack sets none."""


@runtime_checkable
class ChecksImages(Protocol):
    """An attack that supports only some image shapes."""

    def check_images(self, shape: Shape, threat: Threat) -> None:
        """Raise MisfitError for images [C, H, W] that it does not support."""


@runtime_checkable
class ModelAttack(Protocol):
    """An attack on a whole model, in stages; each gets the images still classified correctly."""

    everyone: ClassVar[bool]  # whether misclassified images are attacked too

    @property
    def label(self) -> str:
        """The name of its figure, such as pgd20."""

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        """Its stages by name, in order; MisfitError if the model or threat does not fit."""

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        """Its settings, for the protocol; `standard: False`, with `why`, if they are not the
        published ones.

        Non-default options need no such label: see `jemkit.attacks.departures`.
        """


def training_radius(attack: Attack, usual_px: float) -> float:
    """The radius, in 1/255, that an objective trains at by this attack."""
    if not isinstance(attack, InBall):
        return usual_px
    return radius_of(attack.norm, attack.radius_px, usual_px, "objective.attack.radius_px")


def nonstandard(why: Iterable[str | None]) -> dict[str, Any]:
    """The label of settings that are not the published ones, with each reason once; else empty."""
    reasons = "; ".join(dict.fromkeys(reason for reason in why if reason))
    return {"standard": False, "why": reasons} if reasons else {}


def ball_of(threat: Threat, name: str) -> Ball:
    """The norm of a gradient attack; MisfitError if it is L1, which they do not support."""
    if threat.norm == "L1":
        raise MisfitError(f"{name} supports the norms Linf and L2; for L1 use aa, apgd or square")
    return threat.norm
