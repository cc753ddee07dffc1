"""The hooks through which a plug-in offers parts to jemkit: the whole contract, one for each kind.

A hook returns a mapping of names to classes. Names are one lower-case word. Hooks find parts; none
is called while training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pluggy

from jemkit.attacks.base import Attack, ModelAttack
from jemkit.backbone import BackboneSpec
from jemkit.data import Dataset
from jemkit.metrics.evaluator import Evaluator
from jemkit.models.distances import Distance
from jemkit.models.energy import EnergyModelSpec
from jemkit.models.networks import NetworkSpec
from jemkit.objective import Objective, ObjectiveSpec
from jemkit.sampling.density import DensitySpec
from jemkit.sampling.init_dists import StartSpec
from jemkit.sampling.kernels import Sampler
from jemkit.updaters import UpdaterSpec

hookspec = pluggy.HookspecMarker("jemkit")
hookimpl = pluggy.HookimplMarker("jemkit")


@hookspec
def jemkit_networks() -> Mapping[str, type[NetworkSpec]]:
    """Networks, by name."""
    return {}


@hookspec
def jemkit_energy_models() -> Mapping[str, type[EnergyModelSpec]]:
    """Readings of features as energies, by name."""
    return {}


@hookspec
def jemkit_samplers() -> Mapping[str, type[Sampler]]:
    """Transition kernels, by name."""
    return {}


@hookspec
def jemkit_starts() -> Mapping[str, type[StartSpec]]:
    """Distributions that chains begin from, by name."""
    return {}


@hookspec
def jemkit_densities() -> Mapping[str, type[DensitySpec]]:
    """Ways to draw and learn p(x), by name."""
    return {}


@hookspec
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    """JEM variants, by name."""
    return {}


@hookspec
def jemkit_objectives() -> Mapping[str, type[Objective[Any]] | type[ObjectiveSpec]]:
    """Training objectives, by name."""
    return {}


@hookspec
def jemkit_updaters() -> Mapping[str, type[UpdaterSpec]]:
    """Update rules, by name."""
    return {}


@hookspec
def jemkit_distances() -> Mapping[str, type[Distance]]:
    """Distances between a clean and a perturbed image, by name."""
    return {}


@hookspec
def jemkit_datasets() -> Mapping[str, type[Dataset]]:
    """Labelled images, by name."""
    return {}


@hookspec
def jemkit_attacks() -> Mapping[str, type[Attack] | type[ModelAttack]]:
    """Attacks, by name."""
    return {}


@hookspec
def jemkit_evaluators() -> Mapping[str, type[Evaluator]]:
    """What can be measured of a model, by name."""
    return {}


@hookspec
def jemkit_recipes() -> Mapping[str, Path | Mapping[str, Any]]:
    """Recipe layers, TOML files or tables, by what they belong to.

    `data/NAME`, `backbone/NAME`, `objective/NAME` go under a run that has that part,
    `backbone/NAME/DATA` and `objective/NAME/DATA` under that pair, `run/BACKBONE/OBJECTIVE/DATA`
    under these three, `preset/NAME` under `--preset NAME`.
    """
    return {}
