"""A linear classifier, images of noise, and runs of an attack of random corners on them."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from toys import gen

from jemkit.attacks.base import Perturb, Threat
from jemkit.attacks.pixel_model import PixelModel, pixel_model
from jemkit.data import Images
from jemkit.metrics.attack_runner import Attacked, attacked
from jemkit.metrics.evaluator import Context
from jemkit.options import Options
from jemkit.runtime.modes import eval_mode, frozen

THREAT = Threat("Linf", 25.5)


def toy_subject(seed: int = 0) -> PixelModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pixel_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False)))


def toy_data(n: int = 20, wrong: int = 4) -> Images:
    """Noise with the labels that the toy gives it, but for the first few."""
    x = torch.randint(256, (n, 1, 8, 8), generator=gen(), dtype=torch.uint8)
    y = toy_subject()(x.float() / 255).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % 3
    y[-3:] = torch.arange(3)  # every class is there
    return Images(x, y)


DATA = toy_data()

CALLS: list[Tensor] = []
"""The images of every call of a `Noisy` stage."""


class Noisy(Options):
    """Two stages of random corners: the second knows nothing of the first."""

    everyone: ClassVar[bool] = False

    share: float = 1.0  # of the radius
    push: float = 0.0  # on top of it, which breaks the bound

    @property
    def label(self) -> str:
        return "noisy"

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        def perturb(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
            CALLS.append(x.clone())
            worst = x.clone()
            for _ in range(4):
                u = torch.rand(x.shape, generator=rng).sub(0.5).sign()
                z = (x + self.share * threat.eps * u).clamp(0, 1)
                fooled = subject(z).argmax(1) != y
                worst[fooled] = z[fooled]
            return worst + self.push

        return {"first": perturb, "second": perturb}

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        return {"share": self.share}


def run(
    subject: PixelModel | None = None,
    attack: Any = None,
    data: Images = DATA,
    *,
    threat: Threat = THREAT,
    seed: int = 0,
    batch_size: int = 3,
    **context: Any,
) -> Attacked:
    subject = toy_subject() if subject is None else subject
    ctx = Context(gen(), threat, seed=seed, batch_size=batch_size, **context)
    before, subject.poll = subject.poll, ctx.poll
    try:
        with frozen(subject), eval_mode(subject):
            return attacked(subject, Noisy() if attack is None else attack, data, ctx, "noisy")
    finally:
        subject.poll = before


def same(one: Attacked, other: Attacked) -> None:
    assert torch.equal(one.x_adv, other.x_adv)
    assert torch.equal(one.right, other.right)
    assert one.stages == other.stages
    first, second = ({**result.protocol, "seconds": 0} for result in (one, other))
    assert first == second


def stopping_at(n: int) -> Callable[[], bool]:
    """Stops from the call after the n-th on."""
    requested = 0

    def stop() -> bool:
        nonlocal requested
        requested += 1
        return requested > n

    return stop
