"""The core's own parts, offered through the same hooks as a guest's."""

from collections.abc import Mapping

from jemkit.attacks.ascent import Ascent, L2Ascent, SGLDAscent, SignAscent
from jemkit.attacks.base import Attack, ModelAttack
from jemkit.attacks.pgd import PGD
from jemkit.hookspecs import hookimpl
from jemkit.metrics.evaluator import Accuracy, Evaluator
from jemkit.models.distances import L2, Distance, LogitDistance, NoDistance
from jemkit.models.energy import EnergyModelSpec, LinearHead, LogSumExp
from jemkit.models.networks import MLP, WRN, NetworkSpec, SmallCNN
from jemkit.sampling.density import Contrastive, DensitySpec
from jemkit.sampling.init_dists import Gaussian, Mixture, Noise, StartSpec, Uniform
from jemkit.sampling.kernels import PYLD, SGLD, L2Descent, Sampler, SignDescent
from jemkit.sampling.stateful_kernels import MALA, SGLDMomentum
from jemkit.updaters import SAM, Plain, UpdaterSpec


@hookimpl
def jemkit_networks() -> Mapping[str, type[NetworkSpec]]:
    return {"wrn": WRN, "smallcnn": SmallCNN, "mlp": MLP}


@hookimpl
def jemkit_energy_models() -> Mapping[str, type[EnergyModelSpec]]:
    return {"logsumexp": LogSumExp, "linear": LinearHead}


@hookimpl
def jemkit_samplers() -> Mapping[str, type[Sampler]]:
    return {
        "sgld": SGLD, "sgld_momentum": SGLDMomentum, "mala": MALA, "pyld": PYLD,
        "sign": SignDescent, "l2": L2Descent,
    }  # fmt: skip


@hookimpl
def jemkit_starts() -> Mapping[str, type[StartSpec]]:
    return {"uniform": Uniform, "noise": Noise, "gaussian": Gaussian, "mixture": Mixture}


@hookimpl
def jemkit_densities() -> Mapping[str, type[DensitySpec]]:
    return {"contrastive": Contrastive}


@hookimpl
def jemkit_updaters() -> Mapping[str, type[UpdaterSpec]]:
    return {"plain": Plain, "sam": SAM}


@hookimpl
def jemkit_ascents() -> Mapping[str, type[Ascent]]:
    return {"sign": SignAscent, "sgld": SGLDAscent, "l2": L2Ascent}


@hookimpl
def jemkit_distances() -> Mapping[str, type[Distance]]:
    return {"none": NoDistance, "l2": L2, "logits": LogitDistance}


@hookimpl
def jemkit_attacks() -> Mapping[str, type[Attack] | type[ModelAttack]]:
    return {"pgd": PGD}


@hookimpl
def jemkit_evaluators() -> Mapping[str, type[Evaluator]]:
    return {"accuracy": Accuracy}
