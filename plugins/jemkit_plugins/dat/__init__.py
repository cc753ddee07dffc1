"""DAT: `objective` trains, `chains` samples, `starts` has initial distributions of the chains.

It imports jemkit and its own folder; a new initial distribution goes to `starts`.
"""

from collections.abc import Mapping

from jemkit import BackboneSpec, DensitySpec, ObjectiveSpec, StartSpec, hookimpl
from jemkit_plugins.dat.chains import DATBackbone, FreshChains
from jemkit_plugins.dat.objective import DAT
from jemkit_plugins.dat.starts import Blurred, Foreign, Shuffled

__all__ = ["DAT", "Blurred", "DATBackbone", "Foreign", "FreshChains", "Shuffled"]


@hookimpl
def jemkit_objectives() -> Mapping[str, type[ObjectiveSpec]]:
    return {"dat": DAT}


@hookimpl
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    return {"dat": DATBackbone}


@hookimpl
def jemkit_densities() -> Mapping[str, type[DensitySpec]]:
    return {"fresh": FreshChains}


@hookimpl
def jemkit_starts() -> Mapping[str, type[StartSpec]]:
    return {"blurred": Blurred, "shuffled": Shuffled, "foreign": Foreign}
