"""What the tests of attacks share: a model that has learnt something, images, an evaluation."""

from functools import cache

import torch
import torch.nn.functional as F
from toys import gen

from jemkit.attacks.base import ModelAttack, Threat
from jemkit.attacks.pixel_model import PixelModel
from jemkit.data import Images
from jemkit.metrics.attack_runner import Attacked, attacked
from jemkit.metrics.evaluator import Context, measure
from jemkit.metrics.figures import Figure
from jemkit.models.networks import SmallCNN
from jemkit.testing import toy_model, toy_task
from jemkit.testing.toys import toy_images

LINF, L2 = Threat("Linf", 40), Threat("L2", 255)


@cache
def trained() -> PixelModel:
    """A small network that has learnt three noisy patterns."""
    task = toy_task(n_train=60)
    model = toy_model(task, SmallCNN(channels=4))
    images = task.images("train")
    x, y = task.bounds.from_unit(images.unit()), images.y
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x).logits, y).backward()
        optimizer.step()
    return PixelModel(model.eval(), task.bounds)


def data(n: int = 45) -> Images:
    """Other images of the same patterns."""
    whole = toy_images(120, 3, 8, 1, 0)
    return Images(whole.x[60 : 60 + n], whole.y[60 : 60 + n])


def judged(
    subject: PixelModel, attack: ModelAttack, images: Images, threat: Threat = LINF
) -> Attacked:
    """What an attack makes of images, as an evaluation runs it."""
    results: list[Attacked] = []

    def judge(subject: PixelModel, images: Images, ctx: Context) -> list[Figure]:
        results.append(attacked(subject, attack, images, ctx))
        return []

    measure(subject, images, [judge], Context(gen(), threat, batch_size=20))
    return results[0]
