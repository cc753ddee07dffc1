"""Attacks, purification and generation, step by step."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from jemkit.attacks.pgd import PGD, cross_entropy, negated
from jemkit.attacks.pixel_model import UNIT
from jemkit.errors import MisfitError
from jemkit.models.energy import ModelEnergy
from jemkit.sampling.kernels import Boxed, chain
from jemkit_cli.show.looking import View, views
from jemkit_cli.show.model import ShownModel


class State(NamedTuple):
    """An image at a step of a chain or an attack; step 0 is where it began."""

    step: int
    x: Tensor  # [1, C, H, W] in [0, 1], on the CPU
    view: View


def attack(
    shown: ShownModel, x: Tensor, label: int, *, radius_px: float, steps: int, seed: int = 0
) -> Iterator[State]:
    """PGD on the cross-entropy of a label around x [1, C, H, W], in L-infinity.

    It begins at a random point of the ball, as in an evaluation, and every state is yielded.
    """
    pgd, rng = PGD(steps=steps), shown.generator(seed, "attack")
    x = x.to(shown.device)
    kernel = pgd.kernel(x, radius_px, UNIT, "Linf")
    y = torch.tensor([label], device=shown.device)
    energy = negated(cross_entropy(shown.model, y))
    yield from _followed(shown, x, chain(kernel, energy, pgd.begin(kernel, rng), rng, steps))


def purify(shown: ShownModel, x: Tensor, *, steps: int, seed: int = 0) -> Iterator[State]:
    """The model's own chain on E(x), begun at x [1, C, H, W] and clamped to the pixel range.

    Unlike the chains of training it runs in eval mode, since a single image has no batch
    statistics. MisfitError if the model has no chain.
    """
    if shown.unsampled:
        raise MisfitError(shown.unsampled)
    bounds, rng = shown.model.bounds, shown.generator(seed, "purify")
    x = x.to(shown.device)
    kernel = Boxed(shown.model.density.sampler, bounds)
    states = chain(kernel, ModelEnergy(shown.model.model), bounds.from_unit(x), rng, steps)
    yield from _followed(shown, x, (bounds.to_unit(state).clamp(0, 1) for state in states))


def generate(
    shown: ShownModel,
    label: int | None,
    n: int,
    *,
    steps: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """n images [n, C, H, W] in [0, 1] of newly started chains: of a class on E(x, y), else on E(x).

    `progress` is called with the number of passes through the network so far.
    """
    if shown.unsampled:
        raise MisfitError(shown.unsampled)
    y = None if label is None else torch.full((n,), label, device=shown.device)
    passes = iter(range(1, 2**31))
    with shown.working():
        hook = shown.model.model.register_forward_pre_hook(lambda *_: progress(next(passes)))
        try:
            x = shown.model.sample(n, shown.generator(seed, "generate"), steps=steps, y=y)
        finally:
            hook.remove()
    return x.cpu()


def _followed(shown: ShownModel, x: Tensor, states: Iterator[Tensor]) -> Iterator[State]:
    """x and every state, with its view; the model is free between two steps."""
    step = 0
    while True:
        yield State(step, x.detach().cpu(), views(shown, x)[0])
        with shown.working():
            following = next(states, None)
        if following is None:
            return
        step, x = step + 1, following
