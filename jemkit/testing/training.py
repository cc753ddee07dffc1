"""Conformance checks of objectives and updaters."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from jemkit.backbone import Backbone
from jemkit.errors import Diverged
from jemkit.models.energy import EnergyModelSpec
from jemkit.objective import Objective, ObjectiveSpec, Terms
from jemkit.runtime.pytree import same
from jemkit.testing.law import (
    description,
    generator,
    plain,
    require,
    require_kind,
    require_tensor,
    unchanged,
    untouched,
)
from jemkit.testing.toys import toy_backbone, toy_batch, toy_model, toy_task
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
    require(isinstance(built.needs_density, bool), built, "says whether it needs a density")
    if not built.needs_density:
        plainer = Backbone(backbone.model, bounds=task.bounds, radius_px=task.radius_px)
        _check_draw(built, plainer, batch)
    draws = _check_draw(built, backbone, batch)
    backbone.model.eval()  # so that batch norm's running statistics do not change between calls
    terms, again = (_check_loss(built, backbone, batch, draws) for _ in range(2))
    law = "the loss is pure: called again it is the same"
    require(torch.equal(terms.total, again.total), built, law)
    law = "the total is the weighted sum of its parts"
    parts = sum((weight * term.detach() for weight, term in terms.parts.values()), torch.zeros(()))
    require(torch.allclose(parts, terms.total.detach(), rtol=1e-5, atol=1e-6), built, law)
    law = "a part of weight 0 is left out"
    require(all(weight for weight, _ in terms.parts.values()), built, law)
    watched = not any(t.requires_grad for t in terms.watched.values())
    require(watched, built, "what is watched carries no graph")
    grads = torch.autograd.grad(terms.total, [*backbone.model.parameters()], allow_unused=True)
    moved = any(g is not None and bool(g.abs().max() > 0) for g in grads)
    require(moved, built, "the total has a gradient for the model")


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
    came = f"; it gave {', '.join(attached)}"
    require(not attached, objective, f"what it draws is detached and carries no graph{came}")
    finite = all(bool(t.isfinite().all()) for t in plain(draws))
    require(finite, objective, "what it draws is finite")
    require(same(before, plain(batch)), objective, "leaves the batch alone")
    return draws


def check_updater(spec: UpdaterSpec) -> None:
    """Checks an update rule."""
    still, moved = _Step(spec, lr=0.0), _Step(spec, lr=0.1)
    law = "at a learning rate of 0 the weights stay bit for bit"
    require(same(still.before, still.after), spec, law)
    require(not same(moved.before, moved.after), spec, "a step moves the weights")
    require(moved.calls >= 1, spec, "asks for the terms")
    law = "the guard lets one update through in a step"
    require(moved.guard.updates == 1, spec, law)
    law = "running statistics are updated once per update, at the initial weights"
    require(same(moved.statistics, moved.of_one_pass), spec, law)
    require(same(moved.modes, still.modes), spec, "leaves train and eval modes alone")
    broken = _Step(spec, lr=0.1, factor=float("nan"))
    require(broken.diverged, spec, "a loss that is not finite raises Diverged")
    law = "a loss that is not finite leaves the weights as they were"
    require(same(broken.before, broken.after), spec, law)
    flat = _Step(spec, lr=0.1, factor=0.0)
    law = "a gradient of 0 moves nothing and makes no NaN"
    require(same(flat.before, flat.after), spec, law)


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
        require(made, spec, f"builds what has `step`; it gave {description(updater)}")
        self.requires_grad = {n: p.requires_grad for n, p in self.model.named_parameters()}
        self.random = torch.get_rng_state()
        self.guard, self.calls, self.factor, self.diverged = Guard(), 0, factor, False
        try:
            updater.step(self.terms, self.guard)
            self.guard.settle()
        except Diverged:
            self.diverged = True
        now = {n: p.requires_grad for n, p in self.model.named_parameters()}
        require(now == self.requires_grad, spec, "leaves the model's `requires_grad` alone")
        own = torch.equal(self.random, torch.get_rng_state())
        require(own, spec, "leaves torch's own generator alone")
        self.after = _weights(self.model)
        self.statistics = {n: b.clone() for n, b in self.model.named_buffers()}
        self.modes = {n: m.training for n, m in self.model.named_modules()}

    def terms(self) -> Terms:
        self.calls += 1
        logits = self.model(self.batch.x).logits
        loss = nn.functional.cross_entropy(logits, self.batch.y)
        return Terms.weighted({"p(y|x)": (1.0, self.factor * loss)})


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
