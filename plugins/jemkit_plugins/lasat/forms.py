"""The three forms of LAS-AT, with the constants of the released code."""

from typing import Literal, NamedTuple

FormName = Literal["at", "trades", "awp"]
USUAL_PX = 8.0
"""The radius, in 1/255, for which the sizes of every form are given."""


class Form(NamedTuple):
    """The choices of a strategy, its reward and its training."""

    eps_px: tuple[float, ...]
    iterations: tuple[int, ...]
    step_px: tuple[float, ...]
    beta: tuple[float, ...]  # weights of the divergence, of `trades`
    every: int  # steps from one update of the strategy to the next
    robust: float  # weight of the copy's accuracy under PGD in the reward
    clean: float  # weight of its clean accuracy
    cap: float  # maximum contribution of the loss to the reward
    momentum: float
    weight_decay: float
    clip: float  # limit of the norm of the strategy's gradient
    drops: tuple[float, ...]  # fractions of the run after which its learning rate is divided by ten

    def scaled(self, radius_px: float) -> "Form":
        """The same for another radius."""
        by = radius_px / USUAL_PX
        eps, step = (tuple(by * px for px in sizes) for sizes in (self.eps_px, self.step_px))
        return self._replace(eps_px=eps, step_px=step)


def numbers(low: int, high: int) -> tuple[int, ...]:
    """low, ..., high."""
    return tuple(range(low, high + 1))


FORMS: dict[FormName, Form] = {
    "at": Form(
        numbers(3, 15), numbers(3, 14), numbers(1, 5), (), every=20, robust=4, clean=2, cap=10,
        momentum=0, weight_decay=0, clip=1, drops=(),
    ),
    "trades": Form(
        numbers(5, 9), numbers(7, 14), numbers(2, 4), numbers(5, 9), every=1, robust=8, clean=4,
        cap=20, momentum=0.9, weight_decay=5e-4, clip=float("inf"), drops=(),
    ),
    "awp": Form(
        numbers(7, 15), numbers(8, 16), numbers(2, 5), (), every=1, robust=1, clean=1, cap=10,
        momentum=0, weight_decay=0, clip=1, drops=(0.5, 0.75),
    ),
}  # fmt: skip
"""By name; the presets of CIFAR-100 state its other lists."""
