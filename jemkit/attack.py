"""Attacks: chains up a loss inside a ball around x, and whatever else fools a model."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from jemkit.data import Bounds
from jemkit.energy import EnergyFn
from jemkit.errors import ConfigError, DataError, MisfitError
from jemkit.modes import eval_mode, frozen
from jemkit.options import Options, Radius
from jemkit.pixels import UNIT, PixelModel
from jemkit.sampling import Ball, L2Descent, Projected, Sampler, SignDescent, run

AttackLoss = Callable[[Tensor], Tensor]
"""Of x~ [B, C, H, W]; [B], and higher is worse for the classifier."""

Norm = Literal["Linf", "L2", "L1"]


class Threat(NamedTuple):
    """How far an attack may go: a norm, and a radius in 1/255 of the pixel range."""

    norm: Norm
    radius_px: float

    @property
    def eps(self) -> float:
        """The radius for [0, 1] images."""
        return UNIT.px(self.radius_px)


def radius_of(norm: Norm, given: float | None, usual_px: float, option: str) -> float:
    """The radius that is given, else the data set's usual one, which is of the L-inf norm alone.

    `option` is what a person writes to give one.
    """
    if given is not None:
        return float(given)
    if norm != "Linf":
        usual = {"L2": "127.5, which is 0.5", "L1": "3060, which is 12"}[norm]
        raise ConfigError(
            f"the norm {norm} has no radius by default: give one in 1/255 of the "
            f"pixel range; on CIFAR-10 {option} {usual}, is usual"
        )
    return float(usual_px)


def check_width(threat: Threat, pixels: int, option: str) -> None:
    """Refuse a radius wider than the whole pixel range of images with so many values."""
    widest = 255 * {"Linf": 1.0, "L2": pixels**0.5, "L1": float(pixels)}[threat.norm]
    if threat.radius_px > widest:
        raise ConfigError(
            f"{option} {threat.radius_px:g} is wider than the whole range, {widest:g} in the norm "
            f"{threat.norm}: a radius is given in 1/255 of the pixel range, so 8 for 8/255"
        )


@runtime_checkable
class InBall(Protocol):
    """A part that moves images inside a ball: an attack, or an objective with one of its own."""

    @property
    def norm(self) -> Norm: ...

    @property
    def radius_px(self) -> float | None:
        """None: the data set's usual one, which is L-inf."""
        ...


@runtime_checkable
class ForTraining(Protocol):
    """An attack with options that act in judging alone."""

    def check_training(self) -> None:
        """Refuse those."""
        ...


Perturb = Callable[[Tensor, Tensor, Generator], Tensor]
"""x [B, C, H, W] in [0, 1], y [B] and a generator to x~, in the ball and in [0, 1]."""


@runtime_checkable
class Attack(Protocol):
    """Images near x on which a loss is high; it can train a model and judge one."""

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
        """x~ [B, C, H, W], detached; `radius_px` serves where the attack names none itself."""
        ...


@runtime_checkable
class ModelAttack(Protocol):
    """An attack on a model as a whole, in stages; each has the images that stood the one before."""

    everyone: ClassVar[bool]  # whether images that are wrong already are attacked too

    @property
    def label(self) -> str:
        """The name of its figure, such as pgd20."""
        ...

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        """Its stages by name, in order; a MisfitError where the model or threat does not fit."""
        ...

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        """Its settings, for the protocol of its figures; `standard: False`, with `why`, where
        they are not the published ones. Options that are not the defaults need no such mark: see
        `jemkit.departures`."""
        ...


def training_radius(attack: Attack, usual_px: float) -> float:
    """The radius that an objective trains at by this attack."""
    if not isinstance(attack, InBall):
        return usual_px
    return radius_of(attack.norm, attack.radius_px, usual_px, "objective.attack.radius_px")


def perturbed(x: Tensor, radius: float, rng: Generator, norm: Ball = "Linf") -> Tensor:
    """x moved to a uniformly drawn point of the ball; `radius` in tensor units."""
    if norm == "Linf":
        u = torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype)
        return x + radius * (2 * u - 1)
    n = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype).flatten(1)
    share = torch.rand((len(x), 1), generator=rng, device=x.device, dtype=x.dtype)
    direction = F.normalize(n, dim=1) * share ** (1 / n.shape[1])
    return x + radius * direction.view_as(x)


def drawn_start(kernel: Projected, rng: Generator) -> Tensor:
    """Where a climb begins: a point of the ball, inside the range."""
    return kernel.project(perturbed(kernel.centre, kernel.radius, rng, kernel.norm))


class Best:
    """The worst images for a model among all that were seen: wrong ones first, then by loss."""

    def __init__(self, x: Tensor) -> None:
        self._x = x.clone()
        self._score: Tensor | None = None
        self._wrong = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._finite = torch.ones((), dtype=torch.bool, device=x.device)

    def see(self, x: Tensor, loss: Tensor, wrong: Tensor) -> None:
        """Keep each row that is worse than the one kept; loss [B], wrong [B]."""
        loss = loss.detach()
        score = torch.full_like(loss, -torch.inf) if self._score is None else self._score
        better = (wrong & ~self._wrong) | ((wrong == self._wrong) & (loss > score))
        self._x[better] = x.detach()[better]
        self._score = torch.where(better, loss, score)
        self._wrong = self._wrong | wrong
        self._finite = self._finite & ~loss.isnan().any()

    @property
    def x(self) -> Tensor:
        """The worst of each row; a DataError where a loss was NaN, which nothing is worse than."""
        if not self._finite:
            raise DataError("the model's loss is NaN on attacked images: it has diverged")
        return self._x


class PGD(Options):
    """Projected gradient ascent (Madry et al. 2018) on any loss; sizes in 1/255 of the range.

    As an attack on a model it goes up the cross-entropy, and keeps the worst image of all steps
    and restarts; in training it gives the last one.
    """

    everyone: ClassVar[bool] = True

    steps: int = Field(10, ge=0)
    radius_px: Radius | None = None  # None: the data set's, or the evaluation's
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius
    norm: Ball = "Linf"
    restarts: int = Field(1, ge=1)

    def unused(self) -> dict[str, str]:
        return {} if self.steps else {"step_px": "where steps is 0"}

    @property
    def label(self) -> str:
        return f"pgd{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

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
        self.check_training()
        radius = radius_px if self.radius_px is None else self.radius_px
        kernel = self.kernel(x, radius, bounds, self.norm)
        with frozen(model), eval_mode(model):
            return run(kernel, lambda x: -loss(x), drawn_start(kernel, rng), rng, self.steps)

    def check_training(self) -> None:
        """Refuse restarts, which act in judging alone."""
        if self.restarts > 1:
            raise ConfigError(
                f"a training attack has one start: its restarts are {self.restarts}, set them to 1"
            )

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        norm = ball_of(threat, self.label)
        self._check_threat(threat)

        def perturb(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
            best = Best(x)

            def energy(z: Tensor) -> Tensor:
                logits = subject(z)
                loss = F.cross_entropy(logits, y, reduction="none")
                best.see(z, loss, logits.argmax(1) != y)
                return -loss

            self.climb(energy, x, threat.radius_px, norm, rng)
            return best.x

        return {self.label: perturb}

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        step = threat.radius_px / 4 if self.step_px is None else self.step_px
        return {
            "steps": self.steps,
            "step_px": step,
            "restarts": self.restarts,
            "start": "uniform in the ball",
            "kept": "the worst of all steps",
        }

    def climb(
        self, energy: EnergyFn, x: Tensor, radius_px: float, norm: Ball, rng: Generator
    ) -> None:
        """Go down an energy in the ball from every start; it sees each state, and keeps what it
        wants."""
        kernel = self.kernel(x, radius_px, UNIT, norm)
        for _ in range(self.restarts):
            end = run(kernel, energy, drawn_start(kernel, rng), rng, self.steps)
            with torch.no_grad():
                energy(end)

    def kernel(self, x: Tensor, radius_px: float, bounds: Bounds, norm: Ball) -> Projected:
        """Steepest ascent around x, projected; for an energy, which is a loss upside down."""
        step = bounds.px(radius_px / 4 if self.step_px is None else self.step_px)
        inner: Sampler = (
            SignDescent(step_size=step) if norm == "Linf" else L2Descent(step_size=step)
        )
        return Projected(inner, x, bounds.px(radius_px), bounds, norm)

    def _check_threat(self, threat: Threat) -> None:
        own: dict[str, Any] = {"norm": self.norm} if "norm" in self.model_fields_set else {}
        own |= {} if self.radius_px is None else {"radius_px": self.radius_px}
        if any(value != threat._asdict()[name] for name, value in own.items()):
            raise ConfigError(
                f"pgd is set to {own}, and the evaluation to {threat._asdict()}: in an evaluation "
                "every attack has the same norm and radius; leave pgd's own unset"
            )


def nonstandard(why: Iterable[str]) -> dict[str, Any]:
    """What a card says of settings that are not the published ones; nothing where they are."""
    reasons = "; ".join(dict.fromkeys(why))
    return {"standard": False, "why": reasons} if reasons else {}


def ball_of(threat: Threat, name: str) -> Ball:
    """The norm of a gradient attack, of which there are two."""
    if threat.norm == "L1":
        raise MisfitError(f"{name} knows the norms Linf and L2; for L1 take aa, apgd or square")
    return threat.norm
