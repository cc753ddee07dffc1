"""DUCAT: the objective `ducat`, the energy model `dummies` and the evaluator `foldings`.

It imports jemkit and its own folder; a new variant goes to `objective`, its terms to `terms`.
"""

from jemkit_plugins.ducat.energy import (
    Dummies, DummyEnergy, Fold, folded, jemkit_energy_models, read_as,
)  # fmt: skip
from jemkit_plugins.ducat.foldings import Foldings, jemkit_evaluators
from jemkit_plugins.ducat.objective import DUCAT, DUCATObjective, jemkit_objectives
from jemkit_plugins.ducat.terms import target

__all__ = [
    "DUCAT", "DUCATObjective", "Dummies", "DummyEnergy", "Fold", "Foldings", "folded",
    "jemkit_energy_models", "jemkit_evaluators", "jemkit_objectives", "read_as", "target",
]  # fmt: skip
