"""Laws of what draws: samplers, starts, densities."""

import torch

from jemkit.models.energy import ModelEnergy
from jemkit.runtime.modes import eval_mode
from jemkit.runtime.pytree import same
from jemkit.sampling.density import DensitySpec
from jemkit.sampling.init_dists import StartSpec, Uniform
from jemkit.sampling.kernels import Sampler, chain, last, run
from jemkit.testing.law import generator, require, require_tensor, told, unchanged, untouched
from jemkit.testing.toys import toy_backbone, toy_batch, toy_model, toy_task


def check_sampler(sampler: Sampler) -> None:
    """The laws of a transition kernel."""
    task = toy_task()
    model, x = toy_model(task), toy_batch(task).x
    energy = ModelEnergy(model)
    require(isinstance(sampler.needs_stem, bool), sampler, "says whether it needs a stem")
    with eval_mode(model):
        with unchanged(sampler, "the images that it is given", x), untouched(model, sampler):
            state = sampler.step(energy, x, generator())
        require_tensor(state, sampler, "the state after a step", shape=tuple(x.shape))
        again = sampler.step(energy, x, generator())
        law = "one state and one generator give one next state"
        require(torch.equal(state, again), sampler, law)
        other = torch.cat([x[:-1], -x[-1:]])
        moved = sampler.step(energy, other, generator())
        law = "moves each row by itself: another row's image changes nothing"
        require(torch.allclose(moved[:-1], state[:-1], atol=1e-6), sampler, law)
        rng = generator()
        middle = run(sampler, energy, x, rng, 2)
        split = run(sampler, energy, middle, rng, 3)
        whole = run(sampler, energy, x, generator(), 5)
        law = "a chain of 2 steps and then 3 is one of 5"
        require(torch.equal(split, whole), sampler, law)
        states = list(chain(sampler, energy, x, generator(), 3))
        require(len(states) == 3, sampler, "a chain has as many states as steps")
        detached = not any(s.requires_grad for s in [*states, last(iter(states), x)])
        require(detached, sampler, "what leaves a chain carries no graph")


def check_start(spec: StartSpec) -> None:
    """The laws of a distribution that chains begin from."""
    task = toy_task()
    start = spec.build(task, torch.device("cpu"))
    require(callable(getattr(start, "draw", None)), spec, f"builds what has `draw`: {told(start)}")
    random = torch.get_rng_state()
    for y in (None, torch.arange(5) % task.n_classes):
        with unchanged(spec, "the labels that it is given", *([] if y is None else [y])):
            x = start.draw(5, generator(), y)
        require_tensor(x, spec, "what it draws", shape=(5, *task.shape))
        inside = task.bounds.low <= float(x.min()) and float(x.max()) <= task.bounds.high
        require(inside, spec, "draws inside the model's range")
        again = start.draw(5, generator(), y)
        require(torch.equal(x, again), spec, "one generator gives one draw")
    other = torch.equal(start.draw(5, generator(0)), start.draw(5, generator(1)))
    require(not other, spec, "another generator gives another draw")
    own = torch.equal(random, torch.get_rng_state())
    require(own, spec, "draws from the generator that it is given, never from torch's own")
    require(len(start.draw(0, generator())) == 0, spec, "can be asked for no image at all")


def check_density(spec: DensitySpec) -> None:
    """The laws of how p(x) is drawn and learnt."""
    task = toy_task()
    backbone = toy_backbone(task, density=spec)
    density, model = backbone.density, backbone.model
    with untouched(model, spec):
        x = density.draw(model, 4, generator())
    require_tensor(x, spec, "what it draws", shape=(4, *task.shape))
    before = _copied(density.state_dict())
    fresh = Uniform().build(task, torch.device("cpu"))
    with untouched(model, spec):
        sampled = density.sample(model, 3, generator(), steps=2, start=fresh)
    require_tensor(sampled, spec, "what it samples", shape=(3, *task.shape))
    law = "sampling never touches the buffer"
    require(same(before, density.state_dict()), spec, law)
    density.mark()
    first, second = density.draw(model, 4, generator()), density.draw(model, 4, generator(1))
    density.rollback()
    law = "a rollback undoes every draw since the mark"
    require(same(before, density.state_dict()), spec, law)
    repeat = density.draw(model, 4, generator())
    require(torch.equal(first, repeat), spec, "one state and one generator give one draw")
    density.load_state_dict(before)
    density.draw(model, 4, generator())
    after = _copied(density.state_dict())
    other = toy_backbone(task, model, spec, seed=1).density
    other.load_state_dict(before)
    other.draw(model, 4, generator())
    require(same(after, other.state_dict()), spec, "a loaded state goes on as the saved one")
    require(len(second) == 4, spec, "draws n images of the task's shape")
    energy = model(toy_batch(task).x).energy
    with untouched(model, spec), unchanged(spec, "the energies that it is given", energy.detach()):
        loss = density.loss(energy, energy[:3])
    require_tensor(loss, spec, "the loss", shape=(), attached=True)


def _copied(state: dict[str, object]) -> dict[str, object]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
