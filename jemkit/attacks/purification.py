"""Models that refine their input at test time: JEM-k (Grathwohl et al., ICLR 2020)."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from jemkit.attacks.pixel_model import PixelModel
from jemkit.errors import MisfitError
from jemkit.models.energy import Scores
from jemkit.options import Options
from jemkit.runtime.rng import generator
from jemkit.sampling.kernels import gradient, noise_like

Draw = Callable[[Tensor], Tensor]  # standard normal noise of a tensor's shape
Slope = Literal["exact", "straight_through"]  # through every step, or as the identity (BPDA)


class Refinement(Options):
    """k steps of SGLD on E(x) from the image, before it is classified.

    Steps and noise are in model units, [-1, 1]. Defaults are those of JEM-10.
    """

    steps: int = Field(10, ge=0)  # k
    step_size: float = Field(1.0, ge=0)
    noise: float = Field(0.01, ge=0)  # of every step
    jitter: float = Field(0.03, ge=0)  # added once, to each copy where its chain begins
    samples: int = Field(5, ge=1)  # copies of an image, whose logits are averaged
    gradient: Slope = "exact"  # the gradient for attacks that do not choose one
    seed: int = Field(0, ge=0, lt=2**32)

    def unused(self) -> dict[str, str]:
        idle = {} if self.steps else dict.fromkeys(("step_size", "noise"), "where steps is 0")
        if not self.random:
            idle |= dict.fromkeys(("samples", "seed"), "where neither noise nor jitter is drawn")
        return idle

    @property
    def random(self) -> bool:
        """Whether it is random."""
        return self.jitter > 0 or (self.noise > 0 and self.steps > 0)

    @property
    def copies(self) -> int:
        """The number of copies per image: one if all would be equal."""
        return self.samples if self.random else 1


class Refined(PixelModel):
    """A model that classifies the result of SGLD on its input, averaged over copies.

    E(x) is averaged too. Every image uses the gradient of its own energy, in eval mode, so the
    result does not depend on the batch. Noise is drawn from the seed and the image's own pixels, so
    the logits of an image are the same in any order and in any process. An attack that selects
    among outputs, as PGD does, is therefore evaluated on noise that it knows, and leaves less
    accuracy than on new noise; `eot` and `bpda` draw their own noise and are evaluated on noise
    that they have not seen.
    """

    def __init__(self, subject: PixelModel, refinement: Refinement) -> None:
        super().__init__(subject.model, subject.bounds, subject.density_or_none, subject.dtype)
        self.refinement = refinement

    @property
    def random(self) -> bool:
        """Whether its outputs depend on noise; then use the attacks eot and bpda."""
        return self.refinement.random

    @property
    def card(self) -> dict[str, Any]:
        """What the protocol of a figure says of the refinement."""
        steps = self.refinement.steps
        return {
            "refinement": {**self.refinement.model_dump(), "random": self.random},
            "standard": False,
            "why": f"the model purifies its input by {steps} steps of SGLD",
        }

    def scores(
        self, pixels: Tensor, rng: Generator | None = None, slope: Slope | None = None
    ) -> Scores:
        """Scores of refined images; `rng` draws the noise, `slope` overrides `gradient`."""
        copies = self.refinement.copies
        x = self.bounds.from_unit(pixels).repeat_interleave(copies, dim=0)
        draw = self._own_noise(pixels) if rng is None else partial(noise_like, rng=rng)
        if (slope or self.refinement.gradient) == "exact":
            z = self.refine(x, draw)
        else:
            z = self.refine(x.detach(), draw).detach() + (x - x.detach())  # adds 0, slope 1
        self.poll()
        logits, energy = self.scored(z)
        rows = (len(pixels), copies)
        return Scores(logits.view(*rows, logits.shape[1]).mean(1), energy.view(rows).mean(1))

    def refine(self, x: Tensor, draw: Draw) -> Tensor:
        """The ends of chains from x, in model units; attached to x where x asks for a gradient."""
        options = self.refinement
        if options.jitter:
            x = x + options.jitter * draw(x)
        for _ in range(options.steps):
            self.poll()
            x = x - options.step_size * self._slope(x)
            if options.noise:
                x = x + options.noise * draw(x)
        return x

    def _slope(self, x: Tensor) -> Tensor:
        """dE/dx, row by row; where x is attached, so is the slope."""
        if not (x.requires_grad and torch.is_grad_enabled()):
            return gradient(lambda z: self.scored(z).energy, x)
        (slope,) = torch.autograd.grad(self.scored(x).energy.sum(), x, create_graph=True)
        return slope

    def _own_noise(self, pixels: Tensor) -> Draw:
        """Each image's generator follows from the seed and its pixels, whatever ran before."""
        if not self.random:
            return torch.zeros_like
        rows = [row.contiguous().numpy().data for row in pixels.detach().cpu()]
        names = [hashlib.sha256(row).hexdigest() for row in rows]
        rngs = [generator(torch.device("cpu"), self.refinement.seed, name) for name in names]

        def draw(x: Tensor) -> Tensor:
            shape = (self.refinement.copies, *x.shape[1:])
            noise = [torch.randn(shape, generator=rng, dtype=x.dtype) for rng in rngs]
            return torch.cat(noise).to(x.device)

        return draw

    def extra_repr(self) -> str:
        return str(self.refinement)


def refined(subject: PixelModel, refinement: Refinement) -> PixelModel:
    """The same model with its input refined; weights and density are shared."""
    if isinstance(subject, Refined):
        raise MisfitError("this model already purifies its input: configure one purification")
    return Refined(subject, refinement)
