"""EB-JDAT with the schedule of the released code, in plain torch on jemkit's networks.

It reproduces the passes, micro-batches, copies and retained graphs of the released code, to compare
with jemkit. A step differs from jemkit's in these points. x~ is computed two images at a time, with
three passes per step where one is enough; one of them is f(x), which never changes. Every graph is
retained until the next one replaces it, and the weights require gradients. The replay buffer is in
host memory. Initial states are drawn for every row, image by image. E(x+), E(x~) and f(x~) have
separate passes in the update, and again in the second pass of SAM. The loss is read by the host.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from jemkit.data import Bounds
from jemkit.models.energy import EnergyModel
from jemkit.models.networks import WideBlock, WideResNet
from jemkit.runtime.modes import batch_norms
from jemkit.sampling.init_dists import Start


class Weights(NamedTuple):
    """Of p(x), the clean cross-entropy, p(x~|x) and the robust cross-entropy; as released."""

    a1: float = 1.0
    a2: float = 1.0
    a3: float = 0.1
    a4: float = 1.0


RELEASED = Weights()


def plain_model(model: EnergyModel) -> EnergyModel:
    """The same network, with a tensor of its own for every activation, as the released one has."""
    for module in model.modules():
        if isinstance(module, WideBlock):
            module.forward = MethodType(_plain_block, module)  # type: ignore[method-assign]
        if isinstance(module, WideResNet):
            module.trunk = MethodType(_plain_trunk, module)  # type: ignore[method-assign]
    return model


def _plain_block(self: WideBlock, x: Tensor) -> Tensor:
    h = self.conv1(F.leaky_relu(self.norm1(x), 0.2))
    h = self.conv2(F.leaky_relu(self.norm2(h), 0.2))
    return h + self.shortcut(x)


def _plain_trunk(self: WideResNet, h: Tensor) -> Tensor:
    return F.leaky_relu(self.norm(self.blocks(h)), 0.2).mean(dim=(2, 3))


class Released:
    """One model under the released schedule; SADA-JEM's settings unless told otherwise."""

    def __init__(
        self,
        model: EnergyModel,
        optimizer: torch.optim.Optimizer,
        start: Start,
        rng: Generator,
        *,
        steps: int = 10,
        adv_steps: int = 5,
        capacity: int = 10_000,
        restart: float = 0.05,
        weights: Weights = RELEASED,
        perception: float = 1.0,
        rho: float = 2.0,
        bounds: Bounds = Bounds(),
        micro_batch: int = 2,
    ) -> None:
        self.model, self.optimizer = plain_model(model), optimizer
        self.start, self.rng = start, rng
        self.steps, self.adv_steps, self.restart = steps, adv_steps, restart
        self.weights, self.perception, self.rho = weights, perception, rho
        self.bounds, self.micro_batch = bounds, micro_batch
        self.device = next(model.parameters()).device
        self.host = Generator().manual_seed(0)
        self.buffer = start.draw(capacity, rng).cpu()

    def step(self, x: Tensor, y: Tensor, x_pos: Tensor) -> float:
        """One iteration: both kinds of chains, then SAM's two passes over six forward passes."""
        positive = self.model(x_pos).energy.mean()  # before the chains, its graph kept throughout
        x_neg = self.negatives(len(x_pos))
        x_adv = self.adversary(x, y, self.perturbed(x))
        loss = self.loss(x, y, x_pos, x_neg, x_adv, positive=positive)
        if not abs(float(loss.detach())) < 1e8:  # the host waits for the device here
            raise ArithmeticError(f"diverged: {float(loss)}")
        self.optimizer.zero_grad()
        loss.backward()
        if self.rho:
            self._second_pass(x, y, x_pos, x_neg, x_adv)
        self.optimizer.step()
        return float(loss.detach())

    def loss(
        self,
        x: Tensor,
        y: Tensor,
        x_pos: Tensor,
        x_neg: Tensor,
        x_adv: Tensor,
        *,
        positive: Tensor | None = None,
    ) -> Tensor:
        """Six passes, in the released order; E(x_pos) twice, x~ twice."""
        a1, a2, a3, a4 = self.weights
        if positive is None:
            positive = self.model(x_pos).energy.mean()
        total = a1 * (positive - self.model(x_neg).energy.mean())
        total = total + a2 * F.cross_entropy(self.model(x).logits, y)
        again = self.model(x_pos).energy.mean()
        total = total + a3 * (again - self.model(x_adv).energy.mean())
        return total + a4 * F.cross_entropy(self.model(x_adv).logits, y)

    def negatives(self, n: int) -> Tensor:
        """x^- [n, ...]: clamped noise-free SGLD in train mode from a buffer on the host."""
        slots = torch.randint(len(self.buffer), (n,), generator=self.host)
        fresh = torch.cat([self.start.draw(1, self.rng) for _ in range(n)])  # image by image
        fresh_start = (torch.rand(n, generator=self.host) < self.restart).view(-1, 1, 1, 1)
        stored = self.buffer[slots].to(self.device)
        x = torch.where(fresh_start.to(self.device), fresh, stored)
        for _ in range(self.steps):
            x = x.detach().requires_grad_()
            energy = self.model(x).energy.sum()
            # the released code retains the graph of every step, though nothing uses it again
            (slope,) = torch.autograd.grad(energy, [x], retain_graph=True)
            x = self.bounds.clamp(x.detach() - slope.clamp(-1, 1))
        self.buffer[slots] = x.cpu()
        return x

    def perturbed(self, x: Tensor) -> Tensor:
        """The chain's start: 8/255 either way on the [-1, 1] scale, half of it in pixels."""
        noise = torch.rand(x.shape, generator=self.rng, device=x.device)
        return self.bounds.clamp(x + self.bounds.px(4) * (2 * noise - 1))

    def adversary(self, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        """x~ from `start`: up f(x~)[y] and away from x in the logits' direction, by signs."""
        training = self.model.training
        self.model.eval()
        pieces = [
            self._pair(x[i : i + self.micro_batch], y[i : i + self.micro_batch], part)
            for i, part in zip(
                range(0, len(x), self.micro_batch), start.split(self.micro_batch), strict=True
            )
        ]
        self.model.train(training)
        return torch.cat(pieces)

    def _pair(self, x: Tensor, y: Tensor, x_adv: Tensor) -> Tensor:
        for _ in range(self.adv_steps):
            x_adv = x_adv.detach().requires_grad_()
            wanted = self.model(x_adv).logits.gather(1, y[:, None]).sum()
            clean = F.normalize(self.model(x).logits, dim=1)  # the same at every step
            moved = F.normalize(self.model(x_adv).logits, dim=1)
            climbed = wanted + self.perception * (clean - moved).square().sum()
            # the released code retains this graph too
            (slope,) = torch.autograd.grad(climbed, [x_adv], retain_graph=True)
            x_adv = self.bounds.clamp(x_adv.detach() + self.bounds.px(1) * slope.sign())
        return x_adv

    def _second_pass(
        self, x: Tensor, y: Tensor, x_pos: Tensor, x_neg: Tensor, x_adv: Tensor
    ) -> None:
        """Adaptive SAM: the gradient at the worst weights nearby, all six passes repeated."""
        params = [p for p in self.model.parameters() if p.grad is not None]
        sizes = [(p.detach().abs() * p.grad).norm() for p in params]
        norm = torch.stack(sizes).norm() + 1e-12
        were = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.add_(p.square() * p.grad * (self.rho / norm))
        with _no_momentum(self.model):
            loss = self.loss(x, y, x_pos, x_neg, x_adv)
            self.optimizer.zero_grad()
            loss.backward()
        with torch.no_grad():
            for p, old in zip(params, were, strict=True):
                p.copy_(old)


@contextmanager
def _no_momentum(model: EnergyModel) -> Iterator[None]:
    """Running statistics stay as they are, since nothing new enters them."""
    norms = batch_norms(model)
    were = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, old in zip(norms, were, strict=True):
            norm.momentum = old
