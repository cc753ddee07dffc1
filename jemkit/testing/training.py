"""Conformance checks of objectives and updaters."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._pytree import tree_map

from jemkit.backbone import Backbone
from jemkit.data import Batch
from jemkit.errors import Diverged
from jemkit.models.energy import EnergyModel, EnergyModelSpec
from jemkit.objective import Objective, ObjectiveSpec, StatefulObjective, Terms
from jemkit.runtime.pytree import same
from jemkit.testing.law import (
    description,
    gave,
    generator,
    plain,
    require,
    require_kind,
    require_own_generator,
    require_tensor,
    unchanged,
    untouched,
)
from jemkit.testing.toys import at_box, toy_backbone, toy_batch, toy_model, toy_task
from jemkit.updaters import Guard, UpdaterSpec


def check_objective(
    objective: Objective[Any] | ObjectiveSpec, energy: EnergyModelSpec | None = None
) -> None:
    """Checks an objective: draws do not change the model, and the loss can be repeated.

    `energy` is for an objective that needs its own energy model.
    """
    task = toy_task()
    backbone = toy_backbone(task, toy_model(task, energy=energy))
    batch = toy_batch(task, 6, positives=4)
    backbone.model.train()
    spec = isinstance(objective, ObjectiveSpec)
    built: Any = objective.build(task, generator()) if spec else objective  # type: ignore[union-attr]
    law = "says whether it needs a density"
    require(isinstance(built.needs_density, bool), built, "interface", law)
    if not built.needs_density:
        plainer = Backbone(backbone.model, bounds=task.bounds, radius_px=task.radius_px)
        _check_draw(built, plainer, batch)
    draws = _check_draw(built, backbone, batch)
    backbone.model.eval()  # so that batch norm's running statistics do not change between calls
    terms, again = (_check_loss(built, backbone, batch, draws) for _ in range(2))
    law = "the loss is pure: called again it is the same"
    require(torch.equal(terms.total, again.total), built, "deterministic", law)
    _check_terms(built, terms)
    _check_order(built, backbone, batch, draws, terms)
    _check_gradient(built, backbone, batch, terms)
    corners = at_box(batch.x, task.bounds)
    dark = batch._replace(x=corners, x_pos=corners[: len(batch.x_pos)])
    total = built.loss(backbone, dark, built.draw(backbone, dark, generator())).total
    law = "the loss stays finite where pixels are at the ends of their range"
    require(bool(total.isfinite()), built, "box", law)


def _check_terms(objective: Objective[Any], terms: Terms) -> None:
    law = "the total is the weighted sum of its parts"
    parts = sum((weight * term.detach() for weight, term in terms.parts.values()), torch.zeros(()))
    summed = torch.allclose(parts, terms.total.detach(), rtol=1e-5, atol=1e-6)
    require(summed, objective, "total", law)
    law = "a part of weight 0 is left out"
    require(all(weight for weight, _ in terms.parts.values()), objective, "total", law)
    watched = not any(t.requires_grad for t in terms.watched.values())
    require(watched, objective, "detached", "what is watched carries no graph")


def _check_order(
    objective: Objective[Any], backbone: Backbone, batch: Batch, draws: Any, terms: Terms
) -> None:
    """Rows of a batch have no order: the loss is that of the batch turned around."""
    n = len(batch.x)

    def turned(t: Any) -> Any:
        return t.flip(0) if isinstance(t, Tensor) and t.ndim and len(t) == n else t

    other = objective.loss(backbone, tree_map(turned, batch), tree_map(turned, draws)).total
    law = "the loss does not depend on the order of the images"
    apart = f"turned around it is {other.item():.4g}, and not {terms.total.item():.4g}"
    close = torch.allclose(other, terms.total, rtol=1e-3, atol=1e-5)
    require(close, objective, "rows", law, apart)


def _check_gradient(
    objective: Objective[Any], backbone: Backbone, batch: Batch, terms: Terms
) -> None:
    """A step down the loss raises log p(x, y) of the data, to first order."""
    weights = [*backbone.model.parameters()]
    grads = torch.autograd.grad(terms.total, weights, allow_unused=True)
    moved = any(g is not None and bool(g.abs().max() > 0) for g in grads)
    law = "the total has a gradient for the model"
    require(moved, objective, "differentiable", law)
    if isinstance(objective, StatefulObjective) and objective.parameters():
        return  # its own network learns first
    scores = backbone.model(batch.x)
    target = F.cross_entropy(scores.logits, batch.y)
    if objective.needs_density:
        negative = backbone.density.draw(backbone.model, len(batch.x), generator())
        target = target + scores.energy.mean() - backbone.model(negative).energy.mean()
    wanted = torch.autograd.grad(target, weights, allow_unused=True)
    pairs = zip(grads, wanted, strict=True)
    slope = sum(float((g * w).sum()) for g, w in pairs if g is not None and w is not None)
    law = "a step down the loss raises the likelihood of the data and their labels"
    result = f"-log p changes at the rate {-slope:.2g}"
    require(slope >= 0, objective, "descent", law, result)


def _check_loss(objective: Objective[Any], backbone: Backbone, batch: Any, draws: Any) -> Terms:
    given = plain([batch, draws])
    with untouched(backbone.model, objective), unchanged(objective, "batch and draws", *given):
        terms = objective.loss(backbone, batch, draws)
    require_kind(terms, Terms, objective, "the loss gives Terms, such as Terms.weighted({...})")
    for name, (weight, term) in terms.parts.items():
        require_kind(weight, (int, float), objective, f"the weight of {name!r} is a number")
        require_tensor(term, objective, f"the term {name!r}", shape=(), attached=None)
    what = "the total of the loss on a fresh model"
    require_tensor(terms.total, objective, what, shape=(), attached=True)
    return terms


def _check_draw(objective: Objective[Any], backbone: Backbone, batch: Any) -> Any:
    before = [t.clone() for t in plain(batch)]
    with untouched(backbone.model, objective):
        draws = objective.draw(backbone, batch, generator())
    attached = [description(t) for t in plain(draws) if t.requires_grad]
    came = f"it gave {', '.join(attached)}"
    law = "what it draws is detached and carries no graph"
    require(not attached, objective, "detached", law, came)
    finite = all(bool(t.isfinite().all()) for t in plain(draws))
    require(finite, objective, "finite", "what it draws is finite")
    require(same(before, plain(batch)), objective, "inputs", "leaves the batch alone")
    return draws


def check_updater(spec: UpdaterSpec) -> None:
    """Checks an update rule."""
    still, moved = _Step(spec, lr=0.0), _Step(spec, lr=0.1)
    law = "at a learning rate of 0 the weights stay bit for bit"
    require(same(still.before, still.after), spec, "weights", law)
    require(not same(moved.before, moved.after), spec, "weights", "a step moves the weights")
    require(moved.calls >= 1, spec, "interface", "asks for the terms")
    law = "the guard lets one update through in a step"
    require(moved.guard.updates == 1, spec, "guard", law)
    law = "running statistics are updated once per update, at the initial weights"
    require(same(moved.statistics, moved.of_one_pass), spec, "statistics", law)
    law = "leaves train and eval modes alone"
    require(same(moved.modes, still.modes), spec, "modes", law)
    gentle = _Step(spec, lr=0.01)
    law = "a small step lowers the loss"
    result = f"it went from {gentle.loss_before:.5g} to {gentle.loss_after:.5g}"
    require(gentle.loss_after < gentle.loss_before, spec, "descent", law, result)
    broken = _Step(spec, lr=0.1, factor=float("nan"))
    require(broken.diverged, spec, "guard", "a loss that is not finite raises Diverged")
    law = "a loss that is not finite leaves the weights as they were"
    require(same(broken.before, broken.after), spec, "guard", law)
    flat = _Step(spec, lr=0.1, factor=0.0)
    law = "a gradient of 0 moves nothing and makes no NaN"
    require(same(flat.before, flat.after), spec, "finite", law)


class _Step:
    """One step on a small model, and its effects."""

    def __init__(self, spec: UpdaterSpec, lr: float, factor: float = 1.0) -> None:
        task = toy_task()
        self.model, self.batch = toy_model(task), toy_batch(task)
        self.model.train()
        twin = toy_model(task)
        twin.train()
        twin(self.batch.x)
        self.of_one_pass = {n: b.clone() for n, b in twin.named_buffers()}
        self.before = _weights(self.model)
        updater = spec.build(self.model, SGD(self.model.parameters(), lr=lr, momentum=0.9))
        made = callable(getattr(updater, "step", None))
        require(made, spec, "interface", "builds what has `step`", gave(updater))
        self.requires_grad = {n: p.requires_grad for n, p in self.model.named_parameters()}
        self.random = torch.get_rng_state()
        self.guard, self.calls, self.factor, self.diverged = Guard(), 0, factor, False
        try:
            updater.step(self.terms, self.guard)
            self.guard.settle()
        except Diverged:
            self.diverged = True
        now = {n: p.requires_grad for n, p in self.model.named_parameters()}
        law = "leaves the model's `requires_grad` alone"
        require(now == self.requires_grad, spec, "weights", law)
        require_own_generator(self.random, spec)
        self.after = _weights(self.model)
        self.statistics = {n: b.clone() for n, b in self.model.named_buffers()}
        self.modes = {n: m.training for n, m in self.model.named_modules()}
        self.loss_before, self.loss_after = (self.loss(m).item() for m in (twin, self.model))

    def loss(self, model: EnergyModel) -> Tensor:
        return F.cross_entropy(model(self.batch.x).logits, self.batch.y)

    def terms(self) -> Terms:
        self.calls += 1
        return Terms.weighted({"p(y|x)": (1.0, self.factor * self.loss(self.model))})


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
