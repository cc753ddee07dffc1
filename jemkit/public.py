"""The public names of jemkit, and where each is defined."""

from jemkit.attack import PGD, Attack, ModelAttack, Threat, perturbed
from jemkit.backbone import Backbone, BackboneSpec, Task
from jemkit.data import Augmentation, Bounds, Dataset, Images, Loader, Views
from jemkit.density import Buffer, Contrastive, Density, ReplayBuffer
from jemkit.distance import Distance
from jemkit.energy import EnergyModel, LogSumExpEnergy, ModelEnergy, Network, Scores
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
from jemkit.evaluation import evaluate
from jemkit.evaluator import Context, Evaluator
from jemkit.exporting import load
from jemkit.figures import Figure
from jemkit.fitting import check
from jemkit.hookspecs import hookimpl
from jemkit.networks import Adapted
from jemkit.objective import Batch, Objective, Terms
from jemkit.options import Options, PartOf
from jemkit.pixels import PixelModel
from jemkit.recipe import Recipe, resolve
from jemkit.record import Record
from jemkit.registry import Registry, installed
from jemkit.sampling import PYLD, SGLD, Sampler, SignDescent, chain, gradient, run
from jemkit.session import train
from jemkit.splits import Splits
from jemkit.starts import Start
from jemkit.step import train_step
from jemkit.training import Trainer
from jemkit.update import SAM, Guard, Plain, Updater

__all__ = [
    "PGD", "PYLD", "SAM", "SGLD", "Adapted", "Attack", "Augmentation", "Backbone",
    "BackboneSpec", "Batch", "Bounds", "Buffer", "ConfigError", "Context", "Contrastive",
    "DataError", "Dataset", "Density", "Distance", "Diverged", "EnergyModel", "Evaluator",
    "Figure", "Guard", "Images", "JemkitError", "Loader", "LogSumExpEnergy", "MisfitError",
    "ModelAttack", "ModelEnergy", "Network", "Objective", "Options", "OutOfMemory", "PartOf",
    "PixelModel", "Plain", "Preempted", "Recipe", "Record", "Registry", "ReplayBuffer", "Sampler",
    "Scores", "SignDescent", "Splits", "Start", "Task", "Terms", "Threat", "Trainer", "UnknownName",
    "Updater", "Views", "chain", "check", "evaluate", "gradient", "hookimpl", "installed", "load",
    "perturbed", "resolve", "run", "train", "train_step",
]  # fmt: skip
