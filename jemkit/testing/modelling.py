"""Conformance checks of networks, energy models and backbones."""

import torch

from jemkit.backbone import Backbone, BackboneSpec
from jemkit.models.energy import EnergyModelSpec, Scores
from jemkit.models.networks import NetworkSpec, SmallCNN, seeded_init
from jemkit.runtime.modes import eval_mode
from jemkit.runtime.pytree import same
from jemkit.testing.law import (
    generator,
    require,
    require_kind,
    require_tensor,
    unchanged,
    untouched,
)
from jemkit.testing.toys import toy_batch, toy_model, toy_task


def check_network(spec: NetworkSpec, channels: int = 1) -> None:
    """Checks a network: features of its width, computed in two parts."""
    task = toy_task(channels=channels)
    x = toy_batch(task, 4).x
    random = torch.get_rng_state()
    with seeded_init(generator()):
        network = spec.build(task.shape)
    with seeded_init(generator()):
        again = spec.build(task.shape)
    own = torch.equal(random, torch.get_rng_state())
    require(own, spec, "draws its weights inside `seeded_init`, and nothing elsewhere")
    require_kind(network, torch.nn.Module, spec, "builds a network")
    law = "one generator gives the same weights"
    require(same(network.state_dict(), again.state_dict()), spec, law)
    with torch.no_grad(), eval_mode(network), untouched(network, spec), unchanged(spec, "x", x):
        features = network(x)
        require_tensor(features, spec, "its features", shape=(4, network.width))
        parts = network.trunk(network.stem(x))
        single = network(x[:1])
    require(features.shape == (4, network.width), spec, "gives features [B, width]")
    require(torch.equal(features, parts), spec, "forward is the trunk of the stem")
    law = "in eval mode an image's features do not depend on its neighbours"
    require(torch.allclose(single, features[:1], rtol=1e-4, atol=1e-5), spec, law)


def check_energy_model(spec: EnergyModelSpec) -> None:
    """Checks an energy model: logits [B, K] and an energy per image, in float32."""
    for n_classes in (3, 100):
        task = toy_task(n_classes=n_classes)
        model = toy_model(task, SmallCNN(channels=2), spec)
        batch = toy_batch(task, 4)
        with unchanged(spec, "the images that it is given", batch.x):
            scores = model(batch.x)
        require_kind(scores, Scores, spec, "gives Scores(logits, energy)")
        shapes = {"logits": (4, n_classes), "energy": (4,)}
        for name, shape in shapes.items():
            what = f"`{name}` of its scores"
            require_tensor(getattr(scores, name), spec, what, shape=shape, attached=True)
        joint = scores.joint(batch.y)
        require(joint.shape == (4,), spec, "gives joint energies [B]")
        law = "E(x, y) >= E(x): a probability is no larger than 1"
        require(bool((joint >= scores.energy - 1e-5).all()), spec, law)
        low = model.read(model.network(batch.x).bfloat16().float())
        single = low.energy.dtype == low.logits.dtype == torch.float32
        require(single, spec, "energies and logits are float32")
        with torch.autocast("cpu", torch.bfloat16):
            half = model(batch.x)
        single = half.energy.dtype == half.logits.dtype == torch.float32
        require(single, spec, "energies and logits are float32, whatever the passes run in")


def check_backbone(spec: BackboneSpec, n_classes: int = 3) -> None:
    """Checks a JEM variant; pass one with a small network and a small buffer."""
    task = toy_task(n_classes=n_classes, n_train=8 * n_classes)
    random = torch.get_rng_state()
    backbone, again = spec.build(task, generator()), spec.build(task, generator())
    own = torch.equal(random, torch.get_rng_state())
    require(own, spec, "draws from the generator that it is given, never from torch's own")
    require_kind(backbone, Backbone, spec, "builds a Backbone, as `assemble` does")
    law = "one generator gives the same weights"
    require(same(backbone.model.state_dict(), again.model.state_dict()), spec, law)
    batch = toy_batch(task)
    require(backbone.bounds == task.bounds, spec, "keeps the task's pixel range")
    require(backbone.radius_px == task.radius_px, spec, "keeps the task's radius")
    scores = backbone.scores({"x": batch.x, "x_adv": batch.x[:4]})
    require(scores["x"].logits.shape == (6, n_classes), spec, "gives logits [B, K] for a stream")
    require(scores["x_adv"].energy.shape == (4,), spec, "gives energies [B] for a stream")
    if not backbone.has_density:
        return
    backbone.model.train()
    again.model.train()
    with untouched(backbone.model, spec):
        x = backbone.density.draw(backbone.model, 4, generator())
    require_tensor(x, spec, "what it draws", shape=(4, *task.shape))
    again.model.load_state_dict(backbone.model.state_dict())
    other = again.density.draw(again.model, 4, generator())
    require(torch.equal(x, other), spec, "one generator gives one draw")
