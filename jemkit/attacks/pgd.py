"""PGD: projected ascent of a loss inside a ball around x."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from jemkit.attacks.base import AttackLoss, Perturb, Threat, ball_of
from jemkit.attacks.pixel_model import UNIT, PixelModel
from jemkit.data import Bounds
from jemkit.errors import ConfigError, NotFinite
from jemkit.models.energy import EnergyFn
from jemkit.options import Options, Radius
from jemkit.runtime.modes import BatchNormMode, sampling_mode
from jemkit.sampling.kernels import (
    Ball,
    L2Descent,
    Projected,
    Sampler,
    SignDescent,
    noise_like,
    perturbed,
    run,
)
from jemkit.sampling.stateful_kernels import AdamDescent

STARTS = {
    "uniform": "uniform in the ball",
    "gaussian": "x plus Gaussian noise of 0.001, as TRADES's code has it",
    "clean": "x itself",
}
NOISE_PX = 0.255  # the standard deviation of a Gaussian start, 0.001 of the pixel range

ADAM_PX = 25.5
"""The rate of Adam on pixels, 0.1 of the pixel range."""


class Criterion(NamedTuple):
    """What an attack maximises, and by what it keeps the worst of its images."""

    loss: Tensor  # [B], which the ascent raises
    wrong: Tensor  # [B], bool: a wrong image is kept before any that is not
    rank: Tensor | None = None  # [B], the highest is kept; None: the loss


CriterionFn = Callable[[Tensor], Criterion]
"""x~ [B, C, H, W] to what an attack maximises."""


def cross_entropy(model: nn.Module, y: Tensor) -> AttackLoss:
    """The usual loss of an attack on a model that gives logits."""
    return lambda x: F.cross_entropy(model(x), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """How far the label's logit leads the best other one, [B]; not above 0 where it is wrong."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    rest = logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)
    return own - rest


def negated(loss: AttackLoss) -> EnergyFn:
    """The energy whose descent is the loss's ascent."""
    return lambda x: -loss(x)


class Best:
    """The worst images seen by an attack: misclassified ones first, then by loss."""

    def __init__(self, x: Tensor) -> None:
        self._x = x.clone()
        self._score: Tensor | None = None
        self._wrong = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._finite = torch.ones((), dtype=torch.bool, device=x.device)

    def see(self, x: Tensor, loss: Tensor, wrong: Tensor) -> None:
        """Replace each row by a worse one; loss [B], wrong [B]."""
        loss = loss.detach()
        score = torch.full_like(loss, -torch.inf) if self._score is None else self._score
        better = (wrong & ~self._wrong) | ((wrong == self._wrong) & (loss > score))
        self._x[better] = x.detach()[better]
        self._score = torch.where(better, loss, score)
        self._wrong = self._wrong | wrong
        self._finite = self._finite & ~loss.isnan().any()

    @property
    def x(self) -> Tensor:
        """The worst of each row; NotFinite if a loss was NaN, which cannot be compared."""
        if not self._finite:
            raise NotFinite("the model's loss is NaN on attacked images: it has diverged")
        return self._x


class PGDAttack(Options, ABC):
    """An attack on a model by PGD on a loss of its own; it keeps the worst image of all steps.

    A subclass has the options `steps` and `step_px`, and `restarts` where it takes them.
    """

    everyone: ClassVar[bool] = True

    @property
    @abstractmethod
    def label(self) -> str:
        """The name of its figure."""

    @abstractmethod
    def criterion(self, subject: PixelModel, x: Tensor, y: Tensor, rng: Generator) -> CriterionFn:
        """What is maximised near images x [B, C, H, W] of classes y [B]."""

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        norm = ball_of(threat, self.label)

        def perturb(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
            criterion = self.criterion(subject, x, y, rng)
            return self._pgd.worst(criterion, x, threat.radius_px, norm, rng)

        return {self.label: perturb}

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        return self._pgd.card(threat, n_classes)

    def unused(self) -> dict[str, str]:
        return self._pgd.unused()

    @property
    def _pgd(self) -> "PGD":
        return PGD(**self.model_dump(include={"steps", "step_px", "restarts"}))


class PGD(PGDAttack):
    """Projected gradient ascent (Madry et al. 2018) on any loss; sizes in 1/255 of the range.

    As an attack on a model it maximises the cross-entropy, and returns the worst image of all steps
    and restarts; in training it returns the last one.
    """

    steps: int = Field(10, ge=0)  # of each restart
    radius_px: Radius | None = None  # None: the data set's, or the evaluation's
    step_px: float | None = Field(None, ge=0)  # None: a quarter of the radius; of adam 25.5
    norm: Ball = "Linf"  # of the ball
    restarts: int = Field(1, ge=1)  # starts; the worst image counts
    start: Literal["uniform", "gaussian", "clean"] = "uniform"  # where an ascent begins
    optimizer: Literal["sign", "adam"] = "sign"  # adam: a tenth of the step in the second half
    batch_norm: BatchNormMode = "running_stats"  # of the model while it trains

    def unused(self) -> dict[str, str]:
        idle = {} if self.steps else {"step_px": "where steps is 0"}
        return {**idle, "restarts": 'where start is "clean"'} if self.start == "clean" else idle

    @property
    def label(self) -> str:
        times = f"x{self.restarts}" if self.restarts > 1 else ""
        return f"pgd{self.steps}{times}" + ("-adam" if self.optimizer == "adam" else "")

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
        with sampling_mode(model, self.batch_norm):
            return run(kernel, negated(loss), self.begin(kernel, rng), rng, self.steps)

    def begin(self, kernel: Projected, rng: Generator) -> Tensor:
        """The initial point of an attack: a point of the ball, inside the pixel range."""
        x = kernel.centre
        if self.start == "clean":
            return kernel.project(x)
        if self.start == "gaussian":
            return kernel.project(x + kernel.bounds.px(NOISE_PX) * noise_like(x, rng))
        return kernel.project(perturbed(x, kernel.radius, rng, kernel.norm))

    def check_training(self) -> None:
        """Reject restarts in training, where they have no effect, with a ConfigError."""
        if self.restarts > 1:
            raise ConfigError(
                f"a training attack has one start: restarts is {self.restarts}, set it to 1"
            )

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        """One stage, `pgd`; ConfigError if an option of PGD contradicts the threat model."""
        if self.batch_norm != "running_stats":
            raise ConfigError(
                f'pgd.batch_norm is "{self.batch_norm}", which is for training: an evaluated model '
                "normalises by its running statistics; omit it"
            )
        own: dict[str, Any] = {"norm": self.norm} if "norm" in self.model_fields_set else {}
        own |= {} if self.radius_px is None else {"radius_px": self.radius_px}
        if any(value != threat._asdict()[name] for name, value in own.items()):
            raise ConfigError(
                f"pgd is set to {own}, and the evaluation to {threat._asdict()}: in an "
                f"evaluation every attack has the same norm and radius; do not set those of pgd"
            )
        return super().bind(subject, threat)

    def criterion(self, subject: PixelModel, x: Tensor, y: Tensor, rng: Generator) -> CriterionFn:
        def evaluated(z: Tensor) -> Criterion:
            logits = subject(z)
            return Criterion(F.cross_entropy(logits, y, reduction="none"), logits.argmax(1) != y)

        return evaluated

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        adam = {"optimizer": "adam, a tenth of the step in the second half"}
        return {
            "steps": self.steps,
            "step_px": self._step_px(threat.radius_px),
            **(adam if self.optimizer == "adam" else {}),
            "restarts": self.restarts,
            "start": STARTS[self.start],
            "kept": "the worst of all steps",
        }

    def worst(
        self, criterion: CriterionFn, x: Tensor, radius_px: float, norm: Ball, rng: Generator
    ) -> Tensor:
        """The worst images of all steps and restarts of an ascent from x [B, C, H, W]."""
        best, kernel = Best(x), self.kernel(x, radius_px, UNIT, norm)

        def energy(z: Tensor) -> Tensor:
            loss, wrong, rank = criterion(z)
            best.see(z, loss if rank is None else rank, wrong)
            return -loss

        for _ in range(self.restarts):
            end = run(kernel, energy, self.begin(kernel, rng), rng, self.steps)
            with torch.no_grad():
                energy(end)
        return best.x

    def kernel(self, x: Tensor, radius_px: float, bounds: Bounds, norm: Ball) -> Projected:
        """Steepest ascent around x [B, C, H, W], projected, as descent on the negative loss."""
        step = bounds.px(self._step_px(radius_px))
        inner: Sampler = (
            SignDescent(step_size=step) if norm == "Linf" else L2Descent(step_size=step)
        )
        if self.optimizer == "adam":
            inner = AdamDescent(step_size=step, drop=self.steps // 2)
        return Projected(inner, x, bounds.px(radius_px), bounds, norm)

    def default_step_px(self, radius_px: float) -> float:
        """The step size that `step_px = None` stands for, in 1/255 of the range."""
        return ADAM_PX if self.optimizer == "adam" else radius_px / 4

    def _step_px(self, radius_px: float) -> float:
        return self.default_step_px(radius_px) if self.step_px is None else self.step_px

    @property
    def _pgd(self) -> "PGD":
        return self
