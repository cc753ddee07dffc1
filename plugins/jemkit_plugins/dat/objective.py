"""DAT (arXiv 2510.13872, ICLR 2026): adversarial training with a discriminative energy.

Chains increase the class logit, starting out of distribution; a curriculum makes them longer.
Training starts from the weights of `pgdat` (--init-from).
"""

import math
from contextlib import nullcontext
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from jemkit import (
    PGD, Attack, Backbone, Batch, Boxed, L2Descent, ModelEnergy, Objective, Options, PartOf, Stream,
    Task, Terms, ce_adversary, eval_mode, frozen, frozen_batch_norm, run, watched,
)  # fmt: skip
from jemkit.runtime import distributed
from jemkit_plugins.dat.chains import logistic_loss


class DAT(Options):
    """mean [softplus(E(x)), softplus(-E(x-))] + CE(f(x~), y); the mean is over data and chains.

    x- is the result of T ascent steps on f[y], y the label of x, from the backbone's initial
    distribution, without a ball and without noise. T starts at 0 and is increased by 1 when the
    mean AUC of f(x)[y] against f(x-)[y] over a window reaches `auc`; then a new window starts.
    """

    needs_density: ClassVar[bool] = True

    step_px: float = Field(25.5, ge=0)  # of the L2 norm; 0.1 in [0, 1]
    auc: float = Field(0.8, ge=0, le=1)  # at which the number of steps grows
    window: int = Field(1000, ge=1)  # images; rounded up to whole steps
    max_steps: int = Field(50, ge=0)  # limit of the number of steps
    freeze_batch_norm: bool = True  # normalise by the running statistics of stage 1
    attack: Annotated[Attack, PartOf("attack")] = PGD(
        steps=10, norm="L2", radius_px=127.5, step_px=25.5, start="clean"
    )  # the attack for x~

    def unused(self) -> dict[str, str]:
        idle = dict.fromkeys(("step_px", "auc", "window"), "where max_steps is 0")
        return {} if self.max_steps else idle

    def build(self, task: Task, rng: Generator) -> Objective[Any]:
        return DATObjective(self)


class Draws(NamedTuple):
    """The results of the chains of one step."""

    x_neg: Tensor  # x-, [P, C, H, W]
    x_adv: Tensor  # x~, [B, C, H, W]
    auc: Tensor  # scalar


class DATObjective:
    """Keeps the length of the chains and their last AUCs."""

    needs_density: ClassVar[bool] = True
    sets_chain_steps: ClassVar[bool] = True
    streams: ClassVar[tuple[Stream, ...]] = ("x_pos", "x_neg", "x_adv")

    def __init__(self, options: DAT) -> None:
        self.options, self.steps = options, 0  # T
        self.window: list[Tensor] = []  # the last AUCs since T grew, scalars

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Draws:
        o, model, bounds = self.options, backbone.model, backbone.bounds
        energy = ModelEnergy(model, batch.y[: len(batch.x_pos)])  # -f(x)[y]
        kernel = Boxed(L2Descent(step_size=bounds.px(o.step_px)), bounds)
        x = backbone.density.start.draw(len(batch.x_pos), rng)
        with frozen(model), eval_mode(model):
            x_neg = run(kernel, energy, x, rng, self.steps, name="negatives")
            with torch.no_grad():
                auc = distributed.mean(wins(-energy(batch.x_pos), -energy(x_neg)))
        return Draws(x_neg, ce_adversary(o.attack, backbone, batch.x, batch.y, rng), auc)

    def loss(self, backbone: Backbone, batch: Batch, draws: Draws) -> Terms:
        frozen_norms = self.options.freeze_batch_norm
        with frozen_batch_norm(backbone.model) if frozen_norms else nullcontext():
            scores = backbone.scores(
                {"x_pos": batch.x_pos, "x_neg": draws.x_neg, "x_adv": draws.x_adv}
            )
        bce = logistic_loss(scores["x_pos"].energy, scores["x_neg"].energy)
        ce = F.cross_entropy(scores["x_adv"].logits, batch.y)
        scalars = {**watched(scores, batch.y), "AUC": draws.auc, "T": bce.new_full((), self.steps)}
        return Terms.weighted({"BCE": (1.0, bce), "p(y|x~)": (1.0, ce)}, scalars)

    def after(self, backbone: Backbone, batch: Batch, draws: Draws, rng: Generator) -> None:
        if self.steps >= self.options.max_steps:
            return
        images = len(batch.x_pos) * distributed.size()
        full = math.ceil(self.options.window / images)
        self.window = [*self.window, draws.auc][-full:]
        if len(self.window) < full:
            return
        mean = torch.stack([auc.to(draws.auc.device) for auc in self.window]).mean()
        if float(mean) >= self.options.auc:
            self.steps, self.window = self.steps + 1, []

    def parameters(self) -> list[nn.Parameter]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "window": self.window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.window = state["steps"], state["window"]


def wins(positive: Tensor, negative: Tensor) -> Tensor:
    """The AUC of scores [B] against [n]: the share of pairs in order; a tie counts half."""
    above = positive[:, None] > negative
    return above.float() + 0.5 * (positive[:, None] == negative).float()
