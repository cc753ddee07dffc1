"""Kernels, initial distributions, the replay buffer and the density that chains draw from.

They may import what models may, and models. A part of a Markov chain goes here.
"""

from jemkit.sampling.kernels import (
    PYLD,
    SGLD,
    Ball,
    Boxed,
    Gradient,
    L2Descent,
    Projected,
    Sampler,
    SignDescent,
    chain,
    eager_gradient,
    gradient,
    gradients_by,
    last,
    run,
)  # fmt: skip

__all__ = [
    "PYLD", "SGLD", "Ball", "Boxed", "Gradient", "L2Descent", "Projected", "Sampler", "SignDescent",
    "chain", "eager_gradient", "gradient", "gradients_by", "last", "run",
]  # fmt: skip
