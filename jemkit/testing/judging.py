"""Laws of what measures: distances, attacks, evaluators."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from jemkit.attack import PGD, Attack, ModelAttack, Threat
from jemkit.backbone import Task
from jemkit.cascade import attacked as run_attack
from jemkit.data import Bounds
from jemkit.distance import Distance
from jemkit.evaluator import Context, Evaluator, measure
from jemkit.figures import Figure
from jemkit.modes import eval_mode, frozen
from jemkit.pixels import PixelModel
from jemkit.sampling import gradient
from jemkit.testing.law import generator, require, untouched
from jemkit.testing.toys import toy_backbone, toy_batch, toy_model, toy_task


def check_distance(distance: Distance, task: Task | None = None) -> None:
    """The laws of d(x, x~); give a task of larger images where the distance needs them."""
    task = toy_task(size=max(8, distance.min_size)) if task is None else task
    model, x = toy_model(task), toy_batch(task, 4).x
    moved = task.bounds.clamp(x + 0.2 * torch.randn(x.shape, generator=generator()))
    require(isinstance(distance.min_size, int), distance, "says the smallest image it takes")
    with untouched(model, distance), frozen(model), eval_mode(model):
        far = distance.bind(model, x, task.bounds)
        d = far(moved)
        require(d.shape == (len(x),), distance, "gives one number for each image")
        require(bool((d >= 0).all()), distance, "is never below 0")
        require(bool((far(x).abs() <= 1e-6).all()), distance, "d(x, x) = 0")
        slope = gradient(lambda z: far(z) + 0 * z.flatten(1).sum(1), x)
        law = "pulls nowhere at x itself: its gradient there is 0"
        require(bool((slope.abs() <= 1e-5).all()), distance, law)
        alone = distance.bind(model, x[:1], task.bounds)(moved[:1])
        law = "judges each image by itself, whatever stands beside it"
        require(torch.allclose(alone, d[:1], rtol=1e-4, atol=1e-6), distance, law)


def check_attack(attack: Attack | ModelAttack) -> None:
    """The laws of an attack: inside the ball and the range, repeatable, and a worse loss."""
    if isinstance(attack, Attack):
        _check_ascent(attack)
    if isinstance(attack, ModelAttack):
        _check_model_attack(attack)


def _check_model_attack(attack: ModelAttack) -> None:
    task = toy_task(bounds=Bounds(0.0, 1.0))
    subject, data = PixelModel(toy_model(task), task.bounds), task.images("valid")
    ctx = Context(generator(), Threat("Linf", 25.5), batch_size=5)
    require(isinstance(attack.label, str), attack, "has the name of its figure as label")
    with untouched(subject, attack), frozen(subject), eval_mode(subject):
        state = torch.get_rng_state()
        one, two = (run_attack(subject, attack, data, ctx) for _ in range(2))
        law = "leaves the global random state as it was"
        require(torch.equal(state, torch.get_rng_state()), attack, law)
    require(torch.equal(one.x_adv, two.x_adv), attack, "one generator gives one result")
    require(not one.x_adv.requires_grad, attack, "what it gives carries no graph")
    with eval_mode(subject), torch.no_grad():
        clean = (subject(data.unit()).argmax(1) == data.y).float().mean()
    require(float(one.right.float().mean()) <= float(clean), attack, "no image is made right")


def _check_ascent(attack: Attack) -> None:
    task = toy_task(bounds=Bounds(0.0, 1.0))
    model, batch = toy_model(task), toy_batch(task)

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x).logits, batch.y, reduction="none")

    def attacked(radius_px: float) -> Tensor:
        return attack.draw(
            model, loss, batch.x, generator(), bounds=task.bounds, radius_px=radius_px
        )

    before = batch.x.clone()
    with untouched(model, attack):
        x_adv = attacked(25.5)
    require(torch.equal(batch.x, before), attack, "leaves the images that it is given alone")
    require(x_adv.shape == batch.x.shape, attack, "gives one image for each")
    require(not x_adv.requires_grad, attack, "what it gives carries no graph")
    inside = float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
    require(inside, attack, "stays in the pixel range")
    require(torch.equal(x_adv, attacked(25.5)), attack, "one generator gives one result")
    with eval_mode(model), torch.no_grad():
        worse = float(loss(x_adv).mean()) >= float(loss(batch.x).mean())
    require(worse, attack, "the loss is no lower where it arrives")
    if getattr(attack, "radius_px", None) is None:
        norm = getattr(attack, "norm", "Linf")
        order = 2.0 if norm == "L2" else math.inf
        size = (x_adv - batch.x).flatten(1).norm(order, dim=1)
        law = "stays within the radius, which is in 1/255 of the range"
        require(bool((size <= task.bounds.px(25.5) + 1e-6).all()), attack, law)


def check_evaluator(evaluator: Evaluator) -> None:
    """The laws of a measurement: repeatable figures with their names, counts and protocol."""
    task = toy_task()
    backbone, data = toy_backbone(task), task.images("valid")
    model, subject = backbone.model, PixelModel(backbone.model, task.bounds, backbone.density)
    splits = {"train": task.images("train"), "valid": data, "test": data}

    def measured() -> list[tuple[object, ...]]:
        threat = Threat("Linf", task.radius_px)
        context = Context(
            generator(), threat, batch_size=5, card={"split": "valid"}, images=splits.__getitem__,
            attacks={"pgd": PGD(steps=3)}, quick=True,
        )  # fmt: skip
        return [comparable(f) for f in measure(subject, data, [evaluator], context)]

    with untouched(model, evaluator):
        figures = measured()
    require(len(figures) > 0, evaluator, "gives at least one figure")
    require(figures == measured(), evaluator, "one generator gives one result")
    names = [name for name, *_ in figures]
    require(len(set(names)) == len(names), evaluator, "gives each figure a name of its own")
    for _, value, low, high, _, protocol in figures:
        require(isinstance(value, float), evaluator, "a figure's value is a float")
        if isinstance(low, float) and isinstance(high, float) and isinstance(value, float):
            require(low <= value <= high, evaluator, "a value lies in its interval")
        law = "a figure's protocol holds what the context says of the data"
        require(isinstance(protocol, dict) and "split" in protocol, evaluator, law)


def comparable(figure: Figure) -> tuple[object, ...]:
    """A figure without the seconds that it took."""
    protocol = {k: v for k, v in figure.protocol.items() if k != "seconds"}
    return (*figure[:-1], protocol)
