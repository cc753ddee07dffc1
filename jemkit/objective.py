"""Objectives: a sampling phase, then a loss that can be evaluated at several weights."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from jemkit.attacks.base import Attack, AttackLoss, attack_mode, training_radius
from jemkit.backbone import Backbone
from jemkit.data import Batch, Stream, Task
from jemkit.errors import ConfigError
from jemkit.models.energy import Scores


def watched(scores: Mapping[Stream, Scores], y: Tensor) -> dict[str, Tensor]:
    """Detached scalars [] for the log: every stream's mean energy, and accuracies; y is [B]."""
    scalars = {NAMES[stream]: of.energy.mean() for stream, of in scores.items()}
    accuracies: dict[Stream, str] = {"x": "accuracy", "x_adv": "accuracy(x~)"}
    for stream, name in accuracies.items():
        if stream in scores:
            scalars[name] = (scores[stream].logits.argmax(1) == y).float().mean()
    return scalars


def adversary(
    attack: Attack, backbone: Backbone, loss: AttackLoss, x: Tensor, rng: Generator
) -> Tensor:
    """Images [B, C, H, W] near x [B, C, H, W] on which a loss, [B], is high.

    They are found by an attack in the backbone's range and radius.
    """
    radius = training_radius(attack, backbone.radius_px)
    return attack.draw(backbone.model, loss, x, rng, bounds=backbone.bounds, radius_px=radius)


def ce_adversary(
    attack: Attack, backbone: Backbone, x: Tensor, y: Tensor, rng: Generator
) -> Tensor:
    """Images near x, [B, C, H, W], on which the cross-entropy of the labels y, [B], is high."""
    model = backbone.model

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(model(z).logits, y, reduction="none")

    return adversary(attack, backbone, loss, x, rng)


def kl_adversary(attack: Attack, backbone: Backbone, x: Tensor, rng: Generator) -> Tensor:
    """Images near x [B, C, H, W] whose prediction differs most from that of x.

    The attack maximises KL(p(. | x) || p(. | x~)).
    """
    model = backbone.model
    with attack_mode(attack, model), torch.no_grad():
        clean = model(x).logits
    return adversary(attack, backbone, lambda z: divergence(clean, model(z).logits), x, rng)


def divergence(clean: Tensor, adv: Tensor) -> Tensor:
    """KL(p(. | x) || p(. | x~)) of each row, [B], from logits."""
    return F.kl_div(
        adv.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True
    ).sum(1)


def soft_labels(
    batch: Batch, n_classes: int, smoothing: float = 0.0, *, only_generated: bool = False
) -> Tensor:
    """The labels of a batch as distributions [B, K], smoothed, and mixed as CutMix mixed x."""
    share = torch.full((len(batch.y), 1), smoothing, device=batch.y.device)
    if only_generated:
        none = torch.zeros_like(batch.y)
        share = share * (none if batch.generated is None else batch.generated)[:, None]
    one_hot = torch.zeros(len(batch.y), n_classes, device=batch.y.device)
    one_hot.scatter_(1, batch.y[:, None], 1.0)  # F.one_hot waits for the device
    labels = (1 - share) * one_hot + share / n_classes
    if batch.mixed is None:
        return labels
    own = batch.mixed.weight[:, None]
    return own * labels + (1 - own) * labels[batch.mixed.partner]


class Terms(NamedTuple):
    """A loss by name, and the weighted sum that training minimises."""

    parts: dict[str, tuple[float, Tensor]]  # name: (weight, scalar), attached
    total: Tensor  # scalar
    watched: dict[str, Tensor]  # detached scalars for the log: mean energies, accuracy

    @classmethod
    def weighted(
        cls, parts: Mapping[str, tuple[float, Tensor]], watched: Mapping[str, Tensor] | None = None
    ) -> "Terms":
        """Sum the parts, scalars [] with their weights (Algorithm 1, line 18).

        A part of weight 0 must be left out, not computed: it is a ConfigError if none is left.
        """
        if not parts:
            raise ConfigError("every weight of the objective is 0: nothing to learn")
        total = torch.stack([weight * term for weight, term in parts.values()]).sum()
        detached = {name: value.detach() for name, value in (watched or {}).items()}
        return cls(dict(parts), total, detached)


NAMES: dict[Stream, str] = {"x": "E(x)", "x_pos": "E(x+)", "x_neg": "E(x-)", "x_adv": "E(x~)"}


D = TypeVar("D")


@runtime_checkable
class Objective(Protocol[D]):
    """What one training step minimises: an immutable value, the same for every backbone."""

    needs_density: ClassVar[bool]

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> D:
        """Run every chain of this step; all results are detached."""

    def loss(self, backbone: Backbone, batch: Batch, draws: D) -> Terms:
        """The terms at the model's current weights; pure, so that SAM may call it twice."""


@runtime_checkable
class NamesStreams(Protocol):
    """An objective that declares which streams it passes through the network."""

    @property
    def streams(self) -> tuple[Stream, ...]:
        """In the order of the pass."""


@runtime_checkable
class ChecksBackbone(Protocol):
    """An objective that needs more of a backbone than a density."""

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise MisfitError where it is missing."""


@runtime_checkable
class Conditional(Protocol):
    """An objective that may request chains of given classes."""

    @property
    def conditional(self) -> bool: ...


@runtime_checkable
class SetsChainSteps(Protocol):
    """An objective that chooses the number of steps of its chains, not the backbone."""

    sets_chain_steps: ClassVar[bool]


@runtime_checkable
class StatefulObjective(Protocol):
    """An objective with its own state (a teacher, a momentum), made by `build(task, rng)`."""

    def after(self, backbone: Backbone, batch: Batch, draws: Any, rng: Generator) -> None:
        """Update that state; called once, after the optimizer step."""

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that the main optimizer trains besides the model's."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class ObjectiveSpec(Protocol):
    """The options of an objective with state."""

    needs_density: ClassVar[bool]

    def build(self, task: Task, rng: Generator) -> Objective[Any]: ...
