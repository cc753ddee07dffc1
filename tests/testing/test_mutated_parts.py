"""Ten faults each of a sampler, an objective and a backbone: the law of each fault finds it."""

# ruff: noqa: ARG001 - mutants of one kind have one signature

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from jemkit import (
    Backbone,
    Batch,
    Buffer,
    EnergyModel,
    Options,
    Scores,
    SmallCNN,
    Task,
    Terms,
    eval_mode,
    gradient,
    noise_like,
)
from jemkit.backbone import JEMVariant
from jemkit.models.energy import LogSumExpEnergy
from jemkit.testing import ConformanceError, check_backbone, check_objective, check_sampler

Step = Callable[[Any, Tensor, Generator], Tensor]
CALLS = [0]  # a state that none may have


class Walk(Options):
    """SGLD, or a mutant of it."""

    needs_stem: ClassVar[bool] = False
    by: Any

    def step(self, energy: Any, x: Tensor, rng: Generator) -> Tensor:
        return self.by(energy, x, rng)  # type: ignore[no-any-return]


def sgld(energy: Any, x: Tensor, rng: Generator) -> Tensor:
    return x - gradient(energy, x) + 0.01 * noise_like(x, rng)


def climbing(energy: Any, x: Tensor, rng: Generator) -> Tensor:
    return x + gradient(energy, x) + 0.01 * noise_like(x, rng)


def filling_grads(energy: Any, x: Tensor, rng: Generator) -> Tensor:
    leaf = x.detach().requires_grad_()
    energy(leaf).sum().backward()
    return x - leaf.grad  # type: ignore[operator]


def attached(energy: Any, x: Tensor, rng: Generator) -> Tensor:
    leaf = x.detach().requires_grad_()
    return leaf - torch.autograd.grad(energy(leaf).sum(), leaf)[0]


def training(energy: Any, x: Tensor, rng: Generator) -> Tensor:
    energy.model.train()
    return sgld(energy, x, rng)


def global_noise(energy: Any, x: Tensor, rng: Generator) -> Tensor:
    return x - gradient(energy, x) + 0.01 * torch.randn_like(x)


def flattened(energy: Any, x: Tensor, rng: Generator) -> Tensor:
    return sgld(energy, x, rng).flatten(1)


def in_place(energy: Any, x: Tensor, rng: Generator) -> Tensor:
    return x.sub_(gradient(energy, x))


def normalised(energy: Any, x: Tensor, rng: Generator) -> Tensor:
    slope = gradient(energy, x)
    return x - slope / slope.norm()


def annealed(energy: Any, x: Tensor, rng: Generator) -> Tensor:
    CALLS[0] += 1
    return x - gradient(energy, x) / CALLS[0]


def preconditioned(energy: Any, x: Tensor, rng: Generator) -> Tensor:
    return x - gradient(energy, x) / (1 - x**2)


SAMPLERS: list[tuple[Step, str]] = [
    (climbing, "descent"),
    (filling_grads, "gradients"),
    (attached, "detached"),
    (training, "modes"),
    (global_noise, "generator"),
    (flattened, "shape"),
    (in_place, "inputs"),
    (normalised, "rows"),
    (annealed, "deterministic"),
    (preconditioned, "box"),
]


class Likelihood(Options):
    """-log p(y | x) + E(x+) - E(x-), or a mutant of it."""

    needs_density: ClassVar[bool] = True
    drawn: Any = None
    by: Any = None

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
        if self.drawn is not None:
            return self.drawn(backbone, batch, rng)  # type: ignore[no-any-return]
        return backbone.density.draw(backbone.model, len(batch.x_pos), rng)

    def loss(self, backbone: Backbone, batch: Batch, x_neg: Tensor) -> Terms:
        streams = {"x": batch.x, "x_pos": batch.x_pos, "x_neg": x_neg}
        scores = backbone.scores(streams)  # type: ignore[arg-type]
        if self.by is not None:
            return self.by(backbone, batch, scores)  # type: ignore[no-any-return]
        return weighted(scores, F.cross_entropy(scores["x"].logits, batch.y))


def weighted(scores: Any, classified: Tensor, sign: float = 1.0) -> Terms:
    gap = scores["x_pos"].energy.mean() - scores["x_neg"].energy.mean()
    return Terms.weighted({"p(y|x)": (sign, classified), "p(x)": (sign, gap)})


def rising(backbone: Backbone, batch: Batch, scores: Any) -> Terms:
    return weighted(scores, F.cross_entropy(scores["x"].logits, batch.y), -1.0)


def backward_inside(backbone: Backbone, batch: Batch, scores: Any) -> Terms:
    loss = F.cross_entropy(scores["x"].logits, batch.y)
    loss.backward(retain_graph=True)
    return weighted(scores, loss)


def attached_draw(backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
    with eval_mode(backbone.model):
        return batch.x * backbone.model(batch.x).energy.view(-1, 1, 1, 1)


def eval_draw(backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
    backbone.model.eval()
    return backbone.density.draw(backbone.model, 4, rng)


def global_draw(backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
    return torch.rand_like(batch.x)


def rowwise_loss(backbone: Backbone, batch: Batch, scores: Any) -> Terms:
    each = F.cross_entropy(scores["x"].logits, batch.y, reduction="none")
    return Terms.weighted({"p(y|x)": (1.0, each)})


def noisy_batch(backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
    batch.x.add_(0.1 * noise_like(batch.x, rng))
    return batch.x.clone()


def positional(backbone: Backbone, batch: Batch, scores: Any) -> Terms:
    each = F.cross_entropy(scores["x"].logits, batch.y, reduction="none")
    return weighted(scores, (each * torch.linspace(0, 2, len(each))).mean())


def warmed_up(backbone: Backbone, batch: Batch, scores: Any) -> Terms:
    CALLS[0] += 1
    loss = F.cross_entropy(scores["x"].logits, batch.y)
    return weighted(scores, loss * (1 - 0.5 ** CALLS[0]))


def entropy_of_pixels(backbone: Backbone, batch: Batch, scores: Any) -> Terms:
    unit = (batch.x + 1) / 2
    entropy = -(unit * unit.log()).mean()
    return weighted(scores, F.cross_entropy(scores["x"].logits, batch.y) + 0 * entropy)


OBJECTIVES: list[tuple[dict[str, Any], str]] = [
    ({"by": rising}, "descent"),
    ({"by": backward_inside}, "gradients"),
    ({"drawn": attached_draw}, "detached"),
    ({"drawn": eval_draw}, "modes"),
    ({"drawn": global_draw}, "generator"),
    ({"by": rowwise_loss}, "shape"),
    ({"drawn": noisy_batch}, "inputs"),
    ({"by": positional}, "rows"),
    ({"by": warmed_up}, "deterministic"),
    ({"by": entropy_of_pixels}, "box"),
]


class Mutant(LogSumExpEnergy):
    """JEM's energy with a fault in its forward pass."""

    fault: Callable[[EnergyModel, Tensor, Scores], Scores]

    def forward(self, x: Tensor) -> Scores:
        return type(self).fault(self, x, super().forward(x))


class Reading(Options):
    """Options of the energy of a mutant."""

    fault: Any

    def build(self, network: Any, n_classes: int) -> EnergyModel:
        kind = type("Mutant", (Mutant,), {"fault": staticmethod(self.fault)})
        return kind(network, n_classes)  # type: ignore[no-any-return]


def unharmed(model: EnergyModel, x: Tensor, scores: Scores) -> Scores:
    return scores


def to_train(model: EnergyModel, x: Tensor, scores: Scores) -> Scores:
    model.train()
    return scores


def dithered(model: EnergyModel, x: Tensor, scores: Scores) -> Scores:
    return Scores(scores.logits, scores.energy + 1e-3 * torch.randn(len(x)))


def extra_class(model: EnergyModel, x: Tensor, scores: Scores) -> Scores:
    return Scores(F.pad(scores.logits, (0, 1)), scores.energy)


def scaled_input(model: EnergyModel, x: Tensor, scores: Scores) -> Scores:
    with torch.no_grad():
        x.mul_(0.5)
    return scores


def centred(model: EnergyModel, x: Tensor, scores: Scores) -> Scores:
    return Scores(scores.logits, scores.energy - scores.energy.mean() + 0.1)


def drifting(model: EnergyModel, x: Tensor, scores: Scores) -> Scores:
    CALLS[0] += 1
    return Scores(scores.logits, scores.energy + 0.1 * CALLS[0])


def log_barrier(model: EnergyModel, x: Tensor, scores: Scores) -> Scores:
    return Scores(scores.logits, scores.energy - 1e-3 * (1 - x**2).log().flatten(1).sum(1))


class Variant(JEMVariant):
    """A JEM, or a mutant of it."""

    network: Any = SmallCNN(channels=2, norm="batch")
    buffer: Buffer = Buffer(capacity=20)
    energy: Any = Reading(fault=unharmed)
    after: Any = None

    def build(self, task: Task, rng: Generator) -> Backbone:
        backbone = super().build(task, rng)
        return self.after(backbone) if self.after else backbone


def flipped(backbone: Backbone) -> Backbone:
    density: Any = backbone.density
    density.loss = lambda positive, negative: negative.mean() - positive.mean()
    return backbone


def redrawn(change: Callable[[EnergyModel, Tensor], Tensor]) -> Callable[[Backbone], Backbone]:
    def after(backbone: Backbone) -> Backbone:
        density: Any = backbone.density
        draw = density.draw
        density.draw = lambda model, n, rng, y=None: change(model, draw(model, n, rng, y))
        return backbone

    return after


def with_backward(model: EnergyModel, x: Tensor) -> Tensor:
    model.head.bias.sum().backward()  # type: ignore[operator,union-attr]
    return x


def with_graph(model: EnergyModel, x: Tensor) -> Tensor:
    return x + 0 * model.head.bias.sum()  # type: ignore[operator,union-attr]


BACKBONES: list[tuple[dict[str, Any], str]] = [
    ({"after": flipped}, "descent"),
    ({"after": redrawn(with_backward)}, "gradients"),
    ({"after": redrawn(with_graph)}, "detached"),
    ({"energy": Reading(fault=to_train)}, "modes"),
    ({"energy": Reading(fault=dithered)}, "generator"),
    ({"energy": Reading(fault=extra_class)}, "shape"),
    ({"energy": Reading(fault=scaled_input)}, "inputs"),
    ({"energy": Reading(fault=centred)}, "rows"),
    ({"energy": Reading(fault=drifting)}, "deterministic"),
    ({"energy": Reading(fault=log_barrier)}, "box"),
]
MUTANTS = [
    *((check_sampler, Walk(by=by), law) for by, law in SAMPLERS),
    *((check_objective, Likelihood(**given), law) for given, law in OBJECTIVES),
    *((check_backbone, Variant(**given), law) for given, law in BACKBONES),
]


@pytest.mark.parametrize(("check", "part", "law"), MUTANTS)
def test_a_mutant_breaks_the_law_that_names_its_fault(check: Any, part: Any, law: str) -> None:
    CALLS[0] = 0
    with pytest.raises(ConformanceError) as caught:
        check(part)
    assert caught.value.law == law, caught.value


def test_what_the_mutants_come_from_keeps_every_law() -> None:
    check_sampler(Walk(by=sgld))
    check_objective(Likelihood())
    check_backbone(Variant())


def test_a_sampler_that_climbs_inside_a_backbone_is_refused() -> None:
    with pytest.raises(ConformanceError, match="do not climb"):
        check_backbone(Variant(sampler=Walk(by=climbing)))
