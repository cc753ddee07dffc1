"""The hooks through which a plug-in registers parts, one for each kind.

A hook takes nothing and returns a mapping of names to classes; a name is one lower-case word. Hooks
only register parts; none is called during training.

`jemkit_recipes` returns recipe layers, TOML files or tables, by what they apply to: `data/NAME`,
`backbone/NAME` and `objective/NAME` to a run that has that part, `backbone/NAME/DATA` and
`objective/NAME/DATA` to a pair, `run/BACKBONE/OBJECTIVE/DATA` to all three, `preset/NAME` to
`--preset NAME`. `study/NAME/SCALE` is a study of `jemkit reproduce`, laid over `scale/SCALE`, which
all studies of a scale share.

An entry point of the group `jemkit_api`, whose name is a number, declares the interface that a
distribution is written for: a plug-in of another number is skipped without importing it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pluggy

from jemkit.attacks.ascent import Ascent
from jemkit.attacks.base import Attack, ModelAttack
from jemkit.backbone import BackboneSpec
from jemkit.data import Dataset
from jemkit.metrics.evaluator import Evaluator
from jemkit.metrics.tracker import TrackerSpec
from jemkit.models.distances import Distance
from jemkit.models.energy import EnergyModelSpec
from jemkit.models.networks import NetworkSpec
from jemkit.objective import Objective, ObjectiveSpec
from jemkit.sampling.density import DensitySpec
from jemkit.sampling.init_dists import StartSpec
from jemkit.sampling.kernels import Sampler
from jemkit.updaters import UpdaterSpec

API = 1  # the number of this interface; docs/api-stability.md says what changes it

hookspec = pluggy.HookspecMarker("jemkit")
hookimpl = pluggy.HookimplMarker("jemkit")
"""Marks a function of a plug-in as an implementation of a hook."""


class Kind(NamedTuple):
    """A kind of part."""

    hook: str
    protocol: Any  # of its classes; mypy and `jemkit.testing` check it
    needs: tuple[str, ...]  # what a class must have to be registered


KINDS = {
    "network": Kind("jemkit_networks", NetworkSpec, ("build",)),
    "energy": Kind("jemkit_energy_models", EnergyModelSpec, ("build",)),
    "sampler": Kind("jemkit_samplers", Sampler, ("step", "needs_stem")),
    "start": Kind("jemkit_starts", StartSpec, ("build",)),
    "density": Kind("jemkit_densities", DensitySpec, ("build",)),
    "backbone": Kind("jemkit_backbones", BackboneSpec, ("build",)),
    "objective": Kind("jemkit_objectives", Objective[Any] | ObjectiveSpec, ("needs_density",)),
    "updater": Kind("jemkit_updaters", UpdaterSpec, ("build",)),
    "ascent": Kind("jemkit_ascents", Ascent, ("kernel",)),
    "distance": Kind("jemkit_distances", Distance, ("bind", "min_size")),
    "dataset": Kind("jemkit_datasets", Dataset, ("load", "n_classes", "radius_px", "augmentation")),
    "attack": Kind("jemkit_attacks", Attack | ModelAttack, ()),
    "evaluator": Kind("jemkit_evaluators", Evaluator, ("__call__",)),
    "tracker": Kind("jemkit_trackers", TrackerSpec, ("build",)),
}
HOOKS = (*(kind.hook for kind in KINDS.values()), "jemkit_recipes")


@hookspec
def _nothing() -> Mapping[str, Any]:
    return {}


SPECS = type("Specs", (), dict.fromkeys(HOOKS, _nothing))  # the hooks as pluggy takes them
