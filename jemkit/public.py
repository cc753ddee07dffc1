"""The public names of jemkit, and where each is defined."""

from typing import TYPE_CHECKING

from jemkit.attacks.ascent import Ascent, L2Ascent, SGLDAscent, SignAscent
from jemkit.attacks.base import (
    Attack,
    AttackLoss,
    ModelAttack,
    Norm,
    Perturb,
    Threat,
    attack_mode,
    ball_of,
    nonstandard,
    radius_of,
    training_radius,
)
from jemkit.attacks.pgd import PGD, Best, Criterion, CriterionFn, PGDAttack
from jemkit.attacks.pixel_model import PixelModel
from jemkit.backbone import (
    Backbone,
    BackboneSpec,
    DensityPart,
    EnergyPart,
    JEMVariant,
    NetworkPart,
    SamplerPart,
    StartPart,
    Steps,
    assemble,
    without_batch_norm,
)
from jemkit.config.layers import Table
from jemkit.config.recipe import Recipe, resolve
from jemkit.config.registry import Registry, installed
from jemkit.data import (
    Augmentation,
    Batch,
    Bounds,
    Dataset,
    Images,
    Loader,
    Shape,
    Split,
    Stream,
    Task,
    Views,
    checked,
)
from jemkit.errors import (
    ConfigError,
    DataError,
    Diverged,
    JemkitError,
    MisfitError,
    OutOfMemory,
    Preempted,
    UnknownName,
)
from jemkit.evaluation.evaluate import evaluate
from jemkit.evaluation.loading import LoadedModel, from_pretrained, load
from jemkit.hookspecs import hookimpl
from jemkit.metrics.evaluator import Context, Evaluator, Unmeasurable, batches
from jemkit.metrics.figures import Figure
from jemkit.metrics.record_file import Record
from jemkit.metrics.tracker import (
    Figures,
    ScalarTracker,
    Status,
    TrackedRun,
    Tracker,
    TrackerSpec,
)
from jemkit.models.distances import Distance, LogitDistance, Measure, NoDistance
from jemkit.models.energy import (
    EnergyFn,
    EnergyModel,
    EnergyModelSpec,
    LinearHead,
    LogSumExp,
    LogSumExpEnergy,
    ModelEnergy,
    Network,
    Scores,
)
from jemkit.models.networks import MLP, WRN, Adapted, NetworkSpec, SmallCNN
from jemkit.objective import (
    Objective,
    ObjectiveSpec,
    Terms,
    adversary,
    ce_adversary,
    divergence,
    kl_adversary,
    soft_labels,
    watched,
)
from jemkit.options import Options, PartOf, Radius
from jemkit.runtime.modes import eval_mode, frozen, frozen_batch_norm, frozen_batch_stats
from jemkit.runtime.torchvision_compat import torchvision
from jemkit.sampling.density import Buffer, Contrastive, Density, DensitySpec, ReplayBuffer
from jemkit.sampling.init_dists import Gaussian, Mixture, Start, StartSpec, Uniform
from jemkit.sampling.kernels import (
    PYLD,
    SGLD,
    Ball,
    Boxed,
    KernelState,
    L2Descent,
    Projected,
    Sampler,
    SignDescent,
    StatefulKernel,
    chain,
    gradient,
    noise_like,
    perturbed,
    run,
)
from jemkit.sampling.stateful_kernels import MALA, SGLDMomentum
from jemkit.splits import Splits
from jemkit.step import train_step
from jemkit.training.compatibility import check
from jemkit.training.run import train
from jemkit.training.trainer import Trainer
from jemkit.updaters import SAM, Guard, Plain, Updater, UpdaterSpec, backward, moved_weights

if TYPE_CHECKING:
    from jemkit.training.classifier import JEMClassifier

__all__ = [
    "MALA",
    "MLP",
    "PGD",
    "PYLD",
    "SAM",
    "SGLD",
    "WRN",
    "Adapted",
    "Ascent",
    "Attack",
    "AttackLoss",
    "Augmentation",
    "Backbone",
    "BackboneSpec",
    "Ball",
    "Batch",
    "Best",
    "Bounds",
    "Boxed",
    "Buffer",
    "ConfigError",
    "Context",
    "Contrastive",
    "Criterion",
    "CriterionFn",
    "DataError",
    "Dataset",
    "Density",
    "DensityPart",
    "DensitySpec",
    "Distance",
    "Diverged",
    "EnergyFn",
    "EnergyModel",
    "EnergyModelSpec",
    "EnergyPart",
    "Evaluator",
    "Figure",
    "Figures",
    "Gaussian",
    "Guard",
    "Images",
    "JEMClassifier",
    "JEMVariant",
    "JemkitError",
    "KernelState",
    "L2Ascent",
    "L2Descent",
    "LinearHead",
    "LoadedModel",
    "Loader",
    "LogSumExp",
    "LogSumExpEnergy",
    "LogitDistance",
    "Measure",
    "MisfitError",
    "Mixture",
    "ModelAttack",
    "ModelEnergy",
    "Network",
    "NetworkPart",
    "NetworkSpec",
    "NoDistance",
    "Norm",
    "Objective",
    "ObjectiveSpec",
    "Options",
    "OutOfMemory",
    "PGDAttack",
    "PartOf",
    "Perturb",
    "PixelModel",
    "Plain",
    "Preempted",
    "Projected",
    "Radius",
    "Recipe",
    "Record",
    "Registry",
    "ReplayBuffer",
    "SGLDAscent",
    "SGLDMomentum",
    "Sampler",
    "SamplerPart",
    "ScalarTracker",
    "Scores",
    "Shape",
    "SignAscent",
    "SignDescent",
    "SmallCNN",
    "Split",
    "Splits",
    "Start",
    "StartPart",
    "StartSpec",
    "StatefulKernel",
    "Status",
    "Steps",
    "Stream",
    "Table",
    "Task",
    "Terms",
    "Threat",
    "TrackedRun",
    "Tracker",
    "TrackerSpec",
    "Trainer",
    "Uniform",
    "UnknownName",
    "Unmeasurable",
    "Updater",
    "UpdaterSpec",
    "Views",
    "adversary",
    "assemble",
    "attack_mode",
    "backward",
    "ball_of",
    "batches",
    "ce_adversary",
    "chain",
    "check",
    "checked",
    "divergence",
    "eval_mode",
    "evaluate",
    "from_pretrained",
    "frozen",
    "frozen_batch_norm",
    "frozen_batch_stats",
    "gradient",
    "hookimpl",
    "installed",
    "kl_adversary",
    "load",
    "moved_weights",
    "noise_like",
    "nonstandard",
    "perturbed",
    "radius_of",
    "resolve",
    "run",
    "soft_labels",
    "torchvision",
    "train",
    "train_step",
    "training_radius",
    "watched",
    "without_batch_norm",
]


def __getattr__(name: str) -> object:
    """JEMClassifier when it is first used, as scikit-learn takes a second to import."""
    if name != "JEMClassifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jemkit.training.classifier import JEMClassifier

    return JEMClassifier
