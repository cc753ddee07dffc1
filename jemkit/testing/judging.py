"""Conformance checks of distances, data sets, attacks and evaluators."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jemkit.attacks.base import Attack, ForTraining, ModelAttack, Threat
from jemkit.attacks.pgd import PGD
from jemkit.attacks.pixel_model import PixelModel
from jemkit.data import Augmentation, Bounds, Dataset, Images, Split, Task
from jemkit.errors import ConfigError
from jemkit.metrics.attack_runner import attacked as run_attack
from jemkit.metrics.evaluator import Context, Evaluator, measure
from jemkit.metrics.figures import Figure
from jemkit.models.distances import Distance
from jemkit.runtime.modes import eval_mode, frozen
from jemkit.runtime.pytree import same
from jemkit.sampling.kernels import gradient
from jemkit.testing.law import (
    gave,
    generator,
    require,
    require_kind,
    require_own_generator,
    require_tensor,
    unchanged,
    untouched,
)
from jemkit.testing.toys import toy_backbone, toy_batch, toy_model, toy_task


def check_distance(distance: Distance, task: Task | None = None) -> None:
    """Checks a distance d(x, x~); pass a task with larger images if the distance needs them."""
    law = "says the smallest image it takes"
    require(isinstance(distance.min_size, int), distance, "interface", law)
    task = toy_task(size=max(8, distance.min_size)) if task is None else task
    model, x = toy_model(task), toy_batch(task, 4).x
    moved = task.bounds.clamp(x + 0.2 * torch.randn(x.shape, generator=generator()))
    with untouched(model, distance), frozen(model), eval_mode(model):
        far = distance.bind(model, x, task.bounds)
        law = "`bind` gives a function of x~"
        require(callable(far), distance, "interface", law, gave(far))
        with unchanged(distance, "the images that it is given", x, moved):
            d = far(moved)
        require_tensor(d, distance, "d(x, x~)", shape=(len(x),), attached=None)
        require(bool((d >= 0).all()), distance, "zero", "is never below 0")
        require(bool((far(x).abs() <= 1e-6).all()), distance, "zero", "d(x, x) = 0")
        pulled = gradient(lambda z: far(z) + 0 * z.flatten(1).sum(1), moved)
        law = "has a gradient for x~ where it is above 0: it is not computed from a detached copy"
        steep = bool((d <= 0).all()) or bool((pulled != 0).any())
        require(steep, distance, "differentiable", law)
        slope = gradient(lambda z: far(z) + 0 * z.flatten(1).sum(1), x)
        law = "its gradient at x itself is 0"
        require(bool((slope.abs() <= 1e-5).all()), distance, "zero", law)
        single = distance.bind(model, x[:1], task.bounds)(moved[:1])
        law = "judges each image by itself, whatever stands beside it"
        require(torch.allclose(single, d[:1], rtol=1e-4, atol=1e-6), distance, "rows", law)


def check_dataset(dataset: Dataset) -> None:
    """Checks a data set; its files must exist."""
    k, radius = dataset.n_classes, dataset.radius_px
    counted = isinstance(k, int) and k >= 2
    require(counted, dataset, "labels", "`n_classes` is 2 or more", f"it gave {k!r}")
    law = "`radius_px` is a positive number of 1/255"
    positive = isinstance(radius, int | float) and radius > 0
    require(positive, dataset, "range", law, f"it gave {radius!r}")
    law = "`augmentation` is an Augmentation"
    require_kind(dataset.augmentation, Augmentation, dataset, law)
    law = "`class_names` has a string for each class, if the data set names them"
    names = getattr(dataset, "class_names", None)
    texts = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    require(names is None or (texts and len(names) == k), dataset, "interface", law, gave(names))
    splits: tuple[Split, ...] = ("train", "test")
    shapes = {_check_split(dataset, split) for split in splits}
    law = "both splits are of one shape"
    require(len(shapes) == 1, dataset, "shape", law, f"they have {shapes}")


def _check_split(dataset: Dataset, split: Split) -> tuple[int, ...]:
    """Checks the images and labels of a split; gives the shape of an image."""
    random = torch.get_rng_state()
    images = dataset.load(split)
    require_kind(images, Images, dataset, f"`load({split!r})` gives Images(x, y)")
    require_own_generator(random, dataset)
    typed = images.x.dtype in (torch.uint8, torch.float32)
    law = "images are uint8, or float32 in [0, 1]"
    require(typed, dataset, "dtype", law, gave(images.x))
    unit = images.unit()
    inside = bool(unit.isfinite().all()) and 0 <= float(unit.min()) <= float(unit.max()) <= 1
    require(unit.dim() == 4, dataset, "shape", "images are [N, C, H, W]", gave(unit))
    require(inside, dataset, "range", law, gave(unit))
    counted = images.y.dtype == torch.int64 and images.y.shape == (len(images.x),)
    law = "labels are int64, one for each image"
    require(counted, dataset, "labels", law, gave(images.y))
    if callable(getattr(dataset, "files", None)):
        names = dataset.files(split)  # type: ignore[attr-defined]
        texts = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
        law = f"`files({split!r})` has a string for each image, in their order"
        require(texts and len(names) == len(images.y), dataset, "interface", law, gave(names))
    low, high = int(images.y.min()), int(images.y.max())
    law = f"labels are from 0 to {dataset.n_classes - 1}"
    inside = low >= 0 and high < dataset.n_classes
    require(inside, dataset, "labels", law, f"they are from {low} to {high}")
    again = same(list(dataset.load(split)), list(images))
    require(again, dataset, "deterministic", "loads the same again")
    return tuple(images.x.shape[1:])


def check_attack(attack: Attack | ModelAttack) -> None:
    """Checks an attack: in the ball and the range, repeatable, and the loss increases."""
    try:
        if isinstance(attack, ForTraining):
            attack.check_training()
    except ConfigError:  # with these options it can evaluate a model, but not train it
        pass
    else:
        if isinstance(attack, Attack):
            _check_ascent(attack)
    if isinstance(attack, ModelAttack):
        _check_model_attack(attack)


def _check_model_attack(attack: ModelAttack) -> None:
    task = toy_task(bounds=Bounds(0.0, 1.0))
    subject, data = PixelModel(toy_model(task), task.bounds), task.images("valid")
    ctx = Context(generator(), Threat("Linf", 25.5), batch_size=5)
    law = "has the name of its figure as label"
    require(isinstance(attack.label, str), attack, "interface", law)
    stages = attack.bind(subject, ctx.threat)
    law = "`bind` gives its stages, functions by name"
    require_kind(stages, Mapping, attack, law)
    callables = all(callable(stage) for stage in stages.values())
    require(callables, attack, "interface", law)
    require_kind(attack.card(ctx.threat, task.n_classes), dict, attack, "`card` gives a dict")
    with untouched(subject, attack), frozen(subject), eval_mode(subject):
        state = torch.get_rng_state()
        one, two = (run_attack(subject, attack, data, ctx) for _ in range(2))
        require_own_generator(state, attack)
    law = "one generator gives one result"
    require(torch.equal(one.x_adv, two.x_adv), attack, "deterministic", law)
    law = "what it gives carries no graph"
    require(not one.x_adv.requires_grad, attack, "detached", law)
    with eval_mode(subject), torch.no_grad():
        clean = (subject(data.unit()).argmax(1) == data.y).float().mean()
    harmed = float(one.right.float().mean()) <= float(clean)
    require(harmed, attack, "descent", "no image is made right")


def _check_ascent(attack: Attack) -> None:
    task = toy_task(bounds=Bounds(0.0, 1.0))
    model, batch = toy_model(task), toy_batch(task)

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x).logits, batch.y, reduction="none")

    def attacked(radius_px: float) -> Tensor:
        return attack.draw(
            model, loss, batch.x, generator(), bounds=task.bounds, radius_px=radius_px
        )

    given = unchanged(attack, "the images that it is given", batch.x, batch.y)
    with untouched(model, attack), given:
        x_adv = attacked(25.5)
    require_tensor(x_adv, attack, "what it gives", shape=tuple(batch.x.shape))
    inside = float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
    require(inside, attack, "range", "stays in the pixel range")
    repeated = torch.equal(x_adv, attacked(25.5))
    require(repeated, attack, "deterministic", "one generator gives one result")
    with eval_mode(model), torch.no_grad():
        worse = float(loss(x_adv).mean()) >= float(loss(batch.x).mean())
    require(worse, attack, "descent", "the loss is no lower where it arrives")
    if getattr(attack, "radius_px", None) is None:
        norm = getattr(attack, "norm", "Linf")
        order = 2.0 if norm == "L2" else math.inf
        size = (x_adv - batch.x).flatten(1).norm(order, dim=1)
        law = "stays within the radius, which is in 1/255 of the range"
        inside = bool((size <= task.bounds.px(25.5) + 1e-6).all())
        require(inside, attack, "range", law, f"it went {float(size.max()):.3g}")


def check_evaluator(evaluator: Evaluator) -> None:
    """Checks an evaluator: repeatable figures with names, counts and protocols."""
    task = toy_task()
    backbone, data = toy_backbone(task), task.images("valid")
    model, subject = backbone.model, PixelModel(backbone.model, task.bounds, backbone.density)
    splits = {"train": task.images("train"), "valid": data, "test": data}

    def checked(subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        with unchanged(evaluator, "the images and labels that it is given", data.x, data.y):
            figures = evaluator(subject, data, ctx)
        require_kind(figures, list, evaluator, "gives a list of Figure")
        for figure in figures:
            require_kind(figure, Figure, evaluator, "gives a list of Figure")
            require_kind(figure.value, float, evaluator, f"the value of {figure.name!r} is a float")
            require_kind(figure.protocol, dict, evaluator, "a figure's protocol is a dict")
        return figures

    def measured() -> list[tuple[object, ...]]:
        threat = Threat("Linf", task.radius_px)
        context = Context(
            generator(), threat, batch_size=5, card={"split": "valid"}, images=splits.__getitem__,
            attacks={"pgd": PGD(steps=3)}, quick=True,
        )  # fmt: skip
        return [comparable(f) for f in measure(subject, data, [checked], context)]

    with untouched(model, evaluator):
        figures = measured()
    require(len(figures) > 0, evaluator, "figures", "gives at least one figure")
    law = "one generator gives one result"
    require(figures == measured(), evaluator, "deterministic", law)
    names = [name for name, *_ in figures]
    law = "gives each figure a name of its own"
    require(len(set(names)) == len(names), evaluator, "figures", law)
    for _, value, low, high, _, protocol in figures:
        require(isinstance(value, float), evaluator, "figures", "a figure's value is a float")
        if isinstance(low, float) and isinstance(high, float) and isinstance(value, float):
            require(low <= value <= high, evaluator, "figures", "a value lies in its interval")
        law = "a figure's protocol holds what the context says of the data"
        named = isinstance(protocol, dict) and "split" in protocol
        require(named, evaluator, "figures", law)


def comparable(figure: Figure) -> tuple[object, ...]:
    """A figure without its time in seconds."""
    protocol = {k: v for k, v in figure.protocol.items() if k != "seconds"}
    return (*figure[:-1], protocol)
