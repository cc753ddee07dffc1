"""Every registered part at the size of a toy, a data set of noise, and recipes of them."""

import itertools
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from jemkit import (
    Augmentation,
    Backbone,
    Buffer,
    Images,
    LogSumExpEnergy,
    Network,
    Objective,
    ObjectiveSpec,
    Options,
    Task,
    Updater,
    hookimpl,
    installed,
    resolve,
)
from jemkit.attacks.pgd import PGD
from jemkit.config.recipe import Resolved
from jemkit.config.registry import Plugin, Registry, registry_of
from jemkit.data import Shape
from jemkit.models.networks import SmallCNN
from jemkit.models.norms import Norm
from jemkit.testing.toys import toy_images, toy_task

REGISTRY = installed(third_party=False)
BACKBONES, OBJECTIVES = sorted(REGISTRY["backbone"]), sorted(REGISTRY["objective"])
UPDATERS = sorted(REGISTRY["updater"])

TINY: dict[str, Any] = {
    "network": SmallCNN(channels=2, norm="batch"),
    "buffer": Buffer(capacity=300),
    "steps": 2,
    "adv_steps": 2,
    "attack": PGD(steps=2),
    "auc": 0.0,  # a step more in every chain of `dat`
    "window": 1,
    "teacher": SmallCNN(channels=2, norm="batch"),
    "strategy": SmallCNN(channels=2, norm="batch"),
    "iterations": (1, 2),
}
"""Options that make a part small, for whichever of them it has."""


def tiny(kind: str, name: str, **options: Any) -> Any:
    """A registered part with options that cost nothing."""
    part = REGISTRY[kind][name]
    known = {k: v for k, v in TINY.items() if k in part.model_fields}
    return part(**{**known, **options})


def gen(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def backbone_of(name: str, task: Task | None = None, seed: int = 0, **options: Any) -> Backbone:
    spec = tiny("backbone", name, **options)
    built: Backbone = spec.build(toy_task() if task is None else task, gen(seed))
    built.model.train()
    return built


SUITED: dict[str, dict[str, Any]] = {"ducat": {"energy": REGISTRY["energy"]["dummies"]()}}
"""Options of a backbone that an objective needs, as its recipe has them."""


def backbone_for(objective: str, name: str, **options: Any) -> Backbone:
    """A backbone that suits an objective."""
    return backbone_of(name, **{**SUITED.get(objective, {}), **options})


def objective_of(name: str, task: Task | None = None, **options: Any) -> Objective[Any]:
    built: Objective[Any] | ObjectiveSpec = tiny("objective", name, **options)
    if isinstance(built, ObjectiveSpec):
        return built.build(toy_task() if task is None else task, gen())
    return built


def updater_of(name: str, model: nn.Module, lr: float = 0.05, **options: Any) -> Updater:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
    built: Updater = tiny("updater", name, **options).build(model, optimizer)
    return built


def fits(backbone: str, objective: str) -> bool:
    needs: bool = REGISTRY["objective"][objective].needs_density
    return not needs or backbone != "classifier"


MATRIX = [(b, o, u) for b, o, u in itertools.product(BACKBONES, OBJECTIVES, UPDATERS) if fits(b, o)]
QUICK = [
    (b, o, u)
    for b, o, u in MATRIX
    if o == "ebjdat"
    or (b, u) in {("classifier", "sam"), ("sadajem", "plain")}
    or (o, b) in {("ce", "classifier"), ("dat", "dat")}
    or ((b, u) == ("jem", "sam") and not fits("classifier", o))
]
"""Every backbone and updater with EB-JDAT, and every objective with a classifier and a density
and with both kinds of updates: what the quick tests take of the whole matrix."""
MISFITS = [(b, o) for b, o in itertools.product(BACKBONES, OBJECTIVES) if not fits(b, o)]


class Flat(Network):
    """Pixels as features; its stem is the identity, so it is linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def stem(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def trunk(self, h: Tensor) -> Tensor:
        return h


def linear_model(width: int, n_classes: int, seed: int = 0) -> LogSumExpEnergy:
    """f(x) = W x + b on flattened pixels."""
    model = LogSumExpEnergy(Flat(width), n_classes)
    weight = torch.randn((n_classes, width), generator=gen(seed))
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(torch.randn(n_classes, generator=gen(seed + 1)))
    return model


class Room(Network):
    """A small network on a device that has room for so many images at once."""

    def __init__(self, inner: Network, images: int) -> None:
        super().__init__()
        self.inner, self.images, self.width = inner, images, inner.width
        self.largest = 0

    def stem(self, x: Tensor) -> Tensor:
        self.enter(x)
        return self.inner.stem(x)

    def trunk(self, h: Tensor) -> Tensor:
        self.enter(h)
        return self.inner.trunk(h)

    def enter(self, x: Tensor) -> None:
        if len(x) > self.images:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} images")
        self.largest = max(self.largest, len(x))


class Cramped(Options):
    """Options of a network in a room; for whole runs by way of `CrampedPlugin`."""

    images: int = 1_000_000
    norm: Norm = "none"

    def build(self, shape: Shape) -> Network:
        return Room(SmallCNN(channels=2, norm=self.norm).build(shape), self.images)


class Toy(Options):
    """A data set of 3 x 20 noisy patterns, for whole runs."""

    radius_px: ClassVar[float] = 25.5
    augmentation: ClassVar[Augmentation] = Augmentation(pad=1, flip=True)

    n: int = 60
    broken: bool = False  # its training images hold NaN

    @property
    def n_classes(self) -> int:
        return 3

    def load(self, split: str) -> Images:
        whole = toy_images(self.n + 30, 3, 8, 1, 0)
        part = slice(0, self.n) if split == "train" else slice(self.n, None)
        images = Images(whole.x[part], whole.y[part])
        if not self.broken:
            return images
        return Images(images.unit() * float("nan"), images.y)


class ToyPlugin:
    """Offers `toy` through the same door as any plug-in."""

    @staticmethod
    @hookimpl
    def jemkit_datasets() -> dict[str, Any]:
        return {"toy": Toy}


class CrampedPlugin:
    """Offers `cramped`, as a guest of `toy_registry`."""

    @staticmethod
    @hookimpl
    def jemkit_networks() -> dict[str, Any]:
        return {"cramped": Cramped}


def toy_registry(guests: Iterable[Plugin] = ()) -> Registry:
    """The built-in plug-ins, the toy data set, and whoever else comes."""
    return _registry_with(*guests)


@cache
def _registry_with(*guests: Plugin) -> Registry:
    return registry_of([*_built_in(), Plugin("toy", ToyPlugin), *guests])


@cache
def _built_in() -> list[Plugin]:
    own = [e for e in set(entry_points(group="jemkit")) if e.dist and e.dist.name == "jemkit"]
    return [Plugin(e.name, e.load(), "jemkit") for e in own]


def toy_recipe(
    registry: Registry,
    backbone: str = "sadajem",
    objective: str = "ebjdat",
    updater: str = "plain",
    *overrides: str,
) -> Resolved:
    """A recipe on the toy data set, two epochs of six steps."""
    sizes = [] if backbone == "classifier" else ["backbone.steps=2"]
    sizes += [] if backbone in ("classifier", "dat") else ["backbone.buffer.capacity=60"]
    if objective == "dat":
        sizes += ["objective.auc=0", "objective.window=1", "objective.attack.steps=2"]
    for network in {"teacher", "strategy"} & set(registry["objective"][objective].model_fields):
        sizes += [f"objective.{network}.use=smallcnn", f"objective.{network}.channels=2"]
    return resolve(
        registry,
        config={
            "data": {"use": "toy"},
            "backbone": {
                "use": backbone,
                "network": {"use": "smallcnn", "channels": 2, "norm": "batch"},
            },
            "objective": {"use": objective},
            "updater": {"use": updater},
            "optimizer": {"use": "sgd", "lr": 0.01},
            "run": {"epochs": 2, "batch_size": 9, "device": "cpu", "eval_images": 6},
        },
        overrides=[*sizes, *overrides],
    )


def root() -> Path:
    return Path(__file__).parents[2]
