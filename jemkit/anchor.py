"""A model without a path from its logits back to the pixels, made fit for gradient attacks."""

import torch
from torch import Tensor

from jemkit.energy import Scores
from jemkit.modes import eval_mode
from jemkit.pixels import PixelModel


class Anchored(PixelModel):
    """The same model, whose gradient is 0 where there was none to take.

    Without it a gradient attack ends in an error of autograd's; with it the attack stands still,
    as it does on any other model that gives it no gradient.
    """

    def __init__(self, subject: PixelModel) -> None:
        density = subject.density if subject.has_density else None
        super().__init__(subject.model, subject.bounds, density, subject.dtype)
        self.poll = subject.poll

    def scores(self, pixels: Tensor) -> Scores:
        scores = super().scores(pixels)
        if not pixels.requires_grad:
            return scores
        none = 0 * pixels.flatten(1).sum(1)
        return Scores(scores.logits + none[:, None], scores.energy + none)


def anchored(subject: PixelModel, pixels: Tensor) -> PixelModel:
    """The model as it is, or Anchored where no path leads from its logits to these pixels."""
    x = pixels.detach().clone().requires_grad_()
    with torch.enable_grad(), eval_mode(subject):  # in train mode batch norm would learn from it
        logits = subject(x)
        if logits.requires_grad:
            (grad,) = torch.autograd.grad(logits.sum(), x, allow_unused=True)
            return subject if grad is not None else Anchored(subject)
    return Anchored(subject)
