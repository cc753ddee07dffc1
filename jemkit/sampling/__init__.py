"""Kernels, initial distributions, the replay buffer and the density that chains draw from.

May import: errors, options, runtime, data and models.
A new file: a part of a Markov chain that several methods use.
"""

from jemkit.sampling.kernels import (
    PYLD,
    SGLD,
    Ball,
    Boxed,
    Gradient,
    KernelState,
    L2Descent,
    Projected,
    Sampler,
    SignDescent,
    StatefulKernel,
    chain,
    eager_gradient,
    gradient,
    gradients_by,
    last,
    run,
)  # fmt: skip
from jemkit.sampling.reports import reports
from jemkit.sampling.stateful_kernels import MALA, SGLDMomentum

__all__ = [
    "MALA", "PYLD", "SGLD", "Ball", "Boxed", "Gradient", "KernelState", "L2Descent", "Projected",
    "SGLDMomentum", "Sampler", "SignDescent", "StatefulKernel", "chain",
    "eager_gradient", "gradient", "gradients_by", "last", "reports", "run",
]  # fmt: skip
