"""LAS-AT (Jia et al., CVPR 2022): adversarial training with attacks chosen by a network."""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from jemkit import (
    PGD, Backbone, Batch, Stream, Task, Terms, divergence, eval_mode, watched,
)  # fmt: skip
from jemkit.runtime import tensors
from jemkit_plugins.lasat.attack import Chosen, adversary, hardness
from jemkit_plugins.lasat.forms import Form
from jemkit_plugins.lasat.reward import restored, reward
from jemkit_plugins.lasat.strategy import Strategy, sampled

if TYPE_CHECKING:
    from jemkit_plugins.lasat.options import LASAT


class Draws(NamedTuple):
    """The attacked images, and the strategy's state if this step has updated it."""

    x_adv: Tensor  # [B, C, H, W]
    chosen: Chosen
    learnt: list[Tensor]
    reward: Tensor | None = None


class LASATObjective:
    """Has the strategy; its update by a draw is kept once the model's own update has succeeded."""

    needs_density: ClassVar[bool] = False

    def __init__(
        self, options: "LASAT", form: Form, radius_px: float, task: Task, strategy: Strategy
    ) -> None:
        self.options, self.form, self.radius_px = options, form, radius_px
        self.task, self.strategy = task, strategy

    @property
    def streams(self) -> tuple[Stream, ...]:
        return ("x", "x_adv") if self.options.form == "trades" else ("x_adv",)

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Draws:
        if batch.step % self.form.every:
            return self.resampled(backbone, batch, rng)
        live = self.strategy.state()
        with restored(live):
            value = self.learn(backbone, batch, rng)
            draws = self.resampled(backbone, batch, rng)
            return draws._replace(learnt=tensors.cloned(live), reward=value)

    def resampled(self, backbone: Backbone, batch: Batch, rng: Generator) -> Draws:
        """x~ by actions of the current strategy, in eval mode."""
        with eval_mode(self.strategy), torch.no_grad():
            heads = self.strategy.heads(batch.x)
        return self.attacked(backbone, batch, heads, sampled(heads, rng), rng)

    def attacked(
        self, backbone: Backbone, batch: Batch, heads: Chosen, index: Chosen, rng: Generator
    ) -> Draws:
        """x~ by the attacks with the strategy's indices."""
        name, most = self.options.form, max(self.form.iterations)
        chosen = self.strategy.values(heads, index)
        x_adv = adversary(name, self.radius_px, most, backbone, batch, chosen, rng)
        return Draws(x_adv, chosen, [])

    def learn(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
        """Update the strategy, in train mode, by the reward of sampled actions."""
        o, form, strategy = self.options, self.form, self.strategy
        heads = strategy.heads(batch.x)
        index = sampled(heads, rng)
        draws = self.attacked(backbone, batch, heads, index, rng)
        hard = hardness(backbone, batch, draws.x_adv, draws.chosen.get("beta"))

        def terms() -> Terms:
            torch.clear_autocast_cache()  # the weights change between two passes
            return self.loss(backbone, batch, draws)

        attack, lr = PGD(radius_px=self.radius_px), self.task.lr(batch.step)
        value = reward(backbone, batch, hard, terms, form, o.update, attack, lr, rng)
        gain = strategy.advantage(value) if o.baseline == "ema" else value
        drops = sum(batch.step >= share * self.task.total_steps for share in form.drops)
        strategy.reinforce(heads, index, gain, form, o.strategy_lr * 0.1**drops)
        torch.clear_autocast_cache()
        return value

    def loss(self, backbone: Backbone, batch: Batch, draws: Draws) -> Terms:
        o, y = self.options, batch.y
        images: dict[Stream, Tensor] = {"x": batch.x} if o.form == "trades" else {}
        scores = backbone.scores({**images, "x_adv": draws.x_adv})
        adv = scores["x_adv"].logits
        if o.form == "trades":
            clean = scores["x"].logits
            far = (draws.chosen["beta"] * divergence(clean, adv)).mean()
            terms = {"p(y|x)": (1.0, F.cross_entropy(clean, y)), "KL": (1.0, far)}
        else:
            smoothing = o.smoothing if o.form == "at" else 0.0
            terms = {"p(y|x~)": (1.0, smoothed(adv, y, smoothing))}
        shown = {**watched(scores, y), "strategy eps": draws.chosen["eps_px"].mean()}
        if draws.reward is not None:
            shown["strategy reward"] = draws.reward
        return Terms.weighted(terms, shown)

    def after(self, backbone: Backbone, batch: Batch, draws: Draws, rng: Generator) -> None:
        if draws.learnt:
            tensors.copy(self.strategy.state(), draws.learnt)

    def parameters(self) -> list[nn.Parameter]:
        return []

    def state_dict(self) -> dict[str, Any]:
        strategy = self.strategy
        state = {"network": strategy.network.state_dict(), "velocity": strategy.velocity}
        return {**state, "average": strategy.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        strategy = self.strategy
        strategy.network.load_state_dict(state["network"])
        saved = [*state["velocity"], state["average"]]
        tensors.copy([*strategy.velocity, strategy.average], saved)


def smoothed(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """The cross-entropy of labels with 1 - smoothing on y and the rest on the other classes."""
    k = logits.shape[1]
    return F.cross_entropy(logits, y, label_smoothing=smoothing * k / (k - 1))
