"""The hooks through which a plug-in registers parts, one for each kind.

A hook returns a mapping of names to classes; a name is one lower-case word. Hooks only register
parts; none is called during training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pluggy

from jemkit.attacks.ascent import Ascent
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
    """Energy models: features to scores, by name."""
    return {}


@hookspec
def jemkit_samplers() -> Mapping[str, type[Sampler]]:
    """Transition kernels, by name."""
    return {}


@hookspec
def jemkit_starts() -> Mapping[str, type[StartSpec]]:
    """Initial distributions of chains, by name."""
    return {}


@hookspec
def jemkit_densities() -> Mapping[str, type[DensitySpec]]:
    """Densities: how p(x) is sampled and learnt, by name."""
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
def jemkit_ascents() -> Mapping[str, type[Ascent]]:
    """Steps of a chain up a loss in a ball, by name."""
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
    """Evaluators, by name."""
    return {}


@hookspec
def jemkit_recipes() -> Mapping[str, Path | Mapping[str, Any]]:
    """Recipe layers, TOML files or tables, by what they apply to.

    `data/NAME`, `backbone/NAME` and `objective/NAME` apply to a run that has that part,
    `backbone/NAME/DATA` and `objective/NAME/DATA` to a pair, `run/BACKBONE/OBJECTIVE/DATA` to all
    three, `preset/NAME` to `--preset NAME`.
    """
    return {}
