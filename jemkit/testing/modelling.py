"""Conformance checks of networks, energy models and backbones."""

import torch
from torch import Tensor

from jemkit.backbone import Backbone, BackboneSpec
from jemkit.models.energy import EnergyModelSpec, ModelEnergy, Scores
from jemkit.models.networks import NetworkSpec, SmallCNN, seeded_init
from jemkit.runtime.modes import eval_mode
from jemkit.runtime.pytree import same
from jemkit.sampling.density import Buffer
from jemkit.sampling.kernels import gradient
from jemkit.testing.drawing import check_density_loss, check_descent
from jemkit.testing.law import (
    generator,
    require,
    require_kind,
    require_own_generator,
    require_tensor,
    unchanged,
    untouched,
)
from jemkit.testing.toys import at_box, toy_batch, toy_model, toy_task


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
    law = "draws its weights inside `seeded_init`, and nothing elsewhere"
    require(own, spec, "generator", law)
    require_kind(network, torch.nn.Module, spec, "builds a network")
    law = "one generator gives the same weights"
    require(same(network.state_dict(), again.state_dict()), spec, "deterministic", law)
    with torch.no_grad(), eval_mode(network), untouched(network, spec), unchanged(spec, "x", x):
        features = network(x)
        require_tensor(features, spec, "its features", shape=(len(x), network.width))
        parts = network.trunk(network.stem(x))
        single = network(x[:1])
    law = "forward is the trunk of the stem"
    require(torch.equal(features, parts), spec, "interface", law)
    law = "in eval mode an image's features do not depend on its neighbours"
    require(torch.allclose(single, features[:1], rtol=1e-4, atol=1e-5), spec, "rows", law)


def check_energy_model(spec: EnergyModelSpec) -> None:
    """Checks an energy model: logits [B, K] and an energy per image, in float32."""
    for n_classes in (3, 100):
        task = toy_task(n_classes=n_classes)
        model = toy_model(task, SmallCNN(channels=2), spec)
        batch = toy_batch(task, 4)
        with unchanged(spec, "the images that it is given", batch.x):
            scores = model(batch.x)
        require_kind(scores, Scores, spec, "gives Scores(logits, energy)")
        shapes = {"logits": (len(batch.y), n_classes), "energy": (len(batch.y),)}
        for name, shape in shapes.items():
            what = f"`{name}` of its scores"
            require_tensor(getattr(scores, name), spec, what, shape=shape, attached=True)
        joint = scores.joint(batch.y)
        require(joint.shape == batch.y.shape, spec, "shape", "gives joint energies [B]")
        law = "E(x, y) >= E(x): a probability is no larger than 1"
        require(bool((joint >= scores.energy - 1e-5).all()), spec, "probability", law)
        low = model.read(model.network(batch.x).bfloat16().float())
        single = low.energy.dtype == low.logits.dtype == torch.float32
        require(single, spec, "dtype", "energies and logits are float32")
        with torch.autocast("cpu", torch.bfloat16):
            half = model(batch.x)
        single = half.energy.dtype == half.logits.dtype == torch.float32
        law = "energies and logits are float32, whatever the passes run in"
        require(single, spec, "dtype", law)


def check_backbone(spec: BackboneSpec, n_classes: int = 3) -> None:
    """Checks a JEM variant; pass one with a small network and a small buffer, as `small` gives."""
    task = toy_task(n_classes=n_classes, n_train=8 * n_classes)
    random = torch.get_rng_state()
    backbone, again = spec.build(task, generator()), spec.build(task, generator())
    require_own_generator(random, spec)
    require_kind(backbone, Backbone, spec, "builds a Backbone, as `assemble` does")
    law = "one generator gives the same weights"
    equal = same(backbone.model.state_dict(), again.model.state_dict())
    require(equal, spec, "deterministic", law)
    law = "keeps the task's pixel range"
    require(backbone.bounds == task.bounds, spec, "interface", law)
    law = "keeps the task's radius"
    require(backbone.radius_px == task.radius_px, spec, "interface", law)
    x = toy_batch(task).x
    scores = backbone.scores({"x": x, "x_adv": x[:4]})
    for stream, of in (("x", x), ("x_adv", x[:4])):
        came = scores[stream]  # type: ignore[index]
        shape = (len(of), n_classes)
        require_tensor(came.logits, spec, f"logits of {stream}", shape=shape, attached=True)
        require_tensor(came.energy, spec, f"E({stream})", shape=shape[:1], attached=True)
    _check_energy(backbone, x, spec)
    if backbone.has_density:
        _check_density(backbone, again, spec)


def _check_energy(backbone: Backbone, x: Tensor, spec: BackboneSpec) -> None:
    """In eval mode: a function of one image, without side effects, that chains can descend."""
    model = backbone.model
    with eval_mode(model):
        with untouched(model, spec), unchanged(spec, "the images that it is given", x):
            first, again = model(x), model(x)
        law = "in eval mode one image has one energy: the second pass gives that of the first"
        require(torch.equal(first.energy, again.energy), spec, "deterministic", law)
        apart = (model(x[:1]).energy - first.energy[:1]).detach().abs()
        law = "in eval mode E(x) does not depend on the other images of the batch"
        result = f"alone E(x) differs by {float(apart):.2g}"
        alone = bool((apart <= 1e-5 + 1e-4 * first.energy[:1].detach().abs()).all())
        require(alone, spec, "rows", law, result)
        if backbone.has_density:
            law = "E(x) has a gradient for x, which chains follow"
            steep = bool((gradient(ModelEnergy(model), x) != 0).any())
            require(steep, spec, "differentiable", law)
        box = model(at_box(x, backbone.bounds))
    law = "scores stay finite where pixels are at the ends of their range"
    finite = bool(box.energy.isfinite().all() and box.logits.isfinite().all())
    require(finite, spec, "box", law)


def _check_density(backbone: Backbone, again: Backbone, spec: BackboneSpec) -> None:
    model, density = backbone.model, backbone.density
    model.train()
    again.model.train()
    shape = density.start.draw(1, generator()).shape[1:]
    with untouched(model, spec):
        x = density.draw(model, 4, generator())
    require_tensor(x, spec, "what it draws", shape=(4, *shape))
    again.model.load_state_dict(model.state_dict())
    other = again.density.draw(again.model, 4, generator())
    law = "one generator gives one draw"
    require(torch.equal(x, other), spec, "deterministic", law)
    check_density_loss(density, model, spec)
    check_descent(density.sampler, spec)


def small(spec: BackboneSpec) -> BackboneSpec:
    """The backbone with a small network and a small buffer where it has these options."""
    usual = {"network": SmallCNN(channels=2, norm="batch"), "buffer": Buffer(capacity=20)}
    fields = getattr(type(spec), "model_fields", {})
    given = {name: part for name, part in usual.items() if name in fields}
    return spec.model_copy(update=given) if given else spec  # type: ignore[attr-defined]
