"""The strategy network: chooses the attack on each image; trained by REINFORCE."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from jemkit import EnergyModel, LogSumExp, NetworkSpec, Task, Views, assemble
from jemkit.runtime import distributed
from jemkit.updaters import total_norm
from jemkit_plugins.lasat.forms import Form

Heads = dict[str, Tensor]
"""For each attribute of an attack, logits [B, choices] or chosen indices [B]."""
DECAY = 0.9
"""Decay of the moving average of rewards, with `baseline = "ema"`."""


class Strategy(nn.Module):
    """A network with a head for each attribute of an attack, and the choices of each."""

    def __init__(self, network: EnergyModel, choices: Mapping[str, Tensor], momentum: bool) -> None:
        super().__init__()
        self.network, self.choices = network, dict(choices)
        params = network.parameters() if momentum else ()
        self.velocity = [torch.zeros_like(p) for p in params]
        first = next(iter(self.choices.values()))
        self.average = first.new_zeros(())  # of rewards

    def heads(self, x: Tensor) -> Heads:
        """Logits of every choice, per head."""
        sizes = [len(values) for values in self.choices.values()]
        logits = self.network(x).logits.float()
        return dict(zip(self.choices, torch.split(logits, sizes, 1), strict=True))

    def values(self, heads: Heads, chosen: Heads) -> Heads:
        """The chosen sizes and numbers, [B] each; not finite if the network's outputs are not."""
        return {
            name: values[chosen[name]] + 0 * heads[name].detach().sum(1)
            for name, values in self.choices.items()
        }

    def reinforce(self, heads: Heads, chosen: Heads, reward: Tensor, form: Form, lr: float) -> None:
        """One step on -log p(chosen) times the reward, a single number for the batch."""
        unlikely = [F.cross_entropy(logits, chosen[name]) for name, logits in heads.items()]
        params = [*self.network.parameters()]
        loss = reward * torch.stack(unlikely).sum()
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        distributed.reduce(grads)
        distributed.reduce(b for b in self.network.buffers() if b.is_floating_point())
        scale = (form.clip / (total_norm([*grads], loss) + 1e-6)).clamp(max=1.0)
        with torch.no_grad():
            for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
                step = scale * grad + form.weight_decay * p
                if self.velocity:
                    step = self.velocity[i].mul_(form.momentum).add_(step)
                p.sub_(lr * step)

    def advantage(self, reward: Tensor) -> Tensor:
        """The reward minus the moving average of earlier ones, which is then updated."""
        gain = reward - self.average
        self.average.add_((1 - DECAY) * gain)
        return gain

    def state(self) -> list[Tensor]:
        """Everything that learning changes."""
        live = [*self.network.parameters(), *self.network.buffers()]
        return [t.detach() for t in (*live, *self.velocity, self.average)]


def built(
    task: Task, rng: Generator, network: NetworkSpec, choices: Mapping[str, Sequence[float]],
    *, momentum: bool,
) -> Strategy:  # fmt: skip
    """A new strategy on the generator's device."""
    outputs = replace(task, n_classes=sum(map(len, choices.values())))
    model = assemble(outputs, rng, network=network, energy=LogSumExp(), views=Views()).model
    on = {name: torch.tensor([*map(float, v)], device=rng.device) for name, v in choices.items()}
    return Strategy(model, on, momentum)


def sampled(heads: Heads, rng: Generator) -> Heads:
    """An index of each head for each image, drawn from its distribution."""
    return {name: _index(logits.detach(), rng) for name, logits in heads.items()}


def _index(logits: Tensor, rng: Generator) -> Tensor:
    """The exponential race: no host waits for it. A single choice draws no random number."""
    if logits.shape[1] == 1:
        return torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    times = -torch.rand(logits.shape, generator=rng, device=logits.device).log()
    return (logits.softmax(1) / times).argmax(1)
