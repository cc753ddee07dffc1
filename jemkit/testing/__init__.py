"""Conformance checks of each kind of part, for the authors of plug-ins.

    from jemkit.testing import check_sampler
    check_sampler(MySampler(step_size=0.1))

Each raises ConformanceError with the violated requirement. All run on the CPU, on toys of 8 x 8
pixels, in about a second, and need no test framework.

May import: evaluation, and what evaluation may import.
A new file: checks of a kind of part, of an installation or of a run.
"""

from jemkit.testing.analytic import (
    AnalyticEnergy,
    DoubleWellEnergy,
    GaussianEnergy,
    MixtureEnergy,
    RingEnergy,
    analytic_model,
)
from jemkit.testing.drawing import check_ascent, check_density, check_sampler, check_start
from jemkit.testing.examine import CHECKS, Examination, examine
from jemkit.testing.judging import check_attack, check_dataset, check_distance, check_evaluator
from jemkit.testing.law import ConformanceError
from jemkit.testing.modelling import check_backbone, check_energy_model, check_network, small
from jemkit.testing.toys import toy_backbone, toy_batch, toy_model, toy_task
from jemkit.testing.tracking import check_tracker
from jemkit.testing.training import check_objective, check_updater

__all__ = [
    "CHECKS", "AnalyticEnergy", "ConformanceError", "DoubleWellEnergy", "Examination",
    "GaussianEnergy", "MixtureEnergy", "RingEnergy", "analytic_model", "check_ascent",
    "check_attack", "check_backbone", "check_dataset", "check_density", "check_distance",
    "check_energy_model", "check_evaluator", "check_network", "check_objective", "check_sampler",
    "check_start", "check_tracker", "check_updater", "examine", "small", "toy_backbone",
    "toy_batch", "toy_model", "toy_task",
]  # fmt: skip
