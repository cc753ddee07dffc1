"""Conformance checks of samplers, ascents, initial distributions and densities."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from jemkit.attacks.ascent import Ascent
from jemkit.models.energy import ModelEnergy
from jemkit.runtime.modes import eval_mode
from jemkit.runtime.pytree import same
from jemkit.sampling.density import DensitySpec
from jemkit.sampling.init_dists import StartSpec, Uniform
from jemkit.sampling.kernels import Ball, Reporting, Sampler, begin, chain, last
from jemkit.testing.law import description, generator, require, require_tensor, unchanged, untouched
from jemkit.testing.toys import toy_backbone, toy_batch, toy_model, toy_task


def check_sampler(sampler: Sampler) -> None:
    """Checks a transition kernel, with or without a state."""
    task = toy_task()
    model, x = toy_model(task), toy_batch(task).x
    energy = ModelEnergy(model)
    require(isinstance(sampler.needs_stem, bool), sampler, "says whether it needs a stem")

    def after(x: Tensor, steps: int) -> Any:
        rng = generator()
        state = begin(sampler, x, rng)
        for _ in range(steps):
            state = sampler.step(energy, state, rng)
        return state

    with eval_mode(model):
        with unchanged(sampler, "the images that it is given", x), untouched(model, sampler):
            state = begin(sampler, x, generator())
            _check_state(sampler, state, x, "the state that `init` gives")
        given = [t for t in _tensors(state).values() if t is not x]
        images = unchanged(sampler, "the images that it is given", x)
        inputs_unchanged = unchanged(sampler, "the state that it is given", *given)
        with images, inputs_unchanged, untouched(model, sampler):
            moved = sampler.step(energy, state, generator())
        _check_state(sampler, moved, x, "the state after a step")
        law = f"a step gives a state as `init` does; it gave {description(moved)}"
        require(type(moved) is type(state), sampler, law)
        again = sampler.step(energy, state, generator())
        require(same(again, moved), sampler, "one state and one generator give one next state")
        other = torch.cat([x[:-1], -x[-1:]])
        ours, theirs = (_tensors(after(images, 2))["x"][:-1] for images in (x, other))
        law = "moves each row by itself: another row's image changes nothing"
        require(torch.allclose(ours, theirs, atol=1e-6), sampler, law)
        states = list(chain(sampler, energy, x, generator(), 3))
        require(len(states) == 3, sampler, "a chain has as many states as steps")
        law = "remembers nothing but its state: two chains from one generator are one"
        require(torch.equal(states[-1], _tensors(after(x, 3))["x"]), sampler, law)
        detached = not any(s.requires_grad for s in [*states, last(iter(states), x)])
        require(detached, sampler, "what leaves a chain carries no graph")


def _check_state(sampler: Sampler, state: Any, x: Tensor, what: str) -> None:
    """x itself of a kernel without memory, else a named tuple that begins with x."""
    if isinstance(state, tuple):
        law = f"{what} is a named tuple whose first field is x"
        require(getattr(state, "_fields", ())[:1] == ("x",), sampler, law)
    tensors = _tensors(state)
    require_tensor(tensors.get("x"), sampler, what, shape=tuple(x.shape))
    for name, value in tensors.items():
        sound = not value.requires_grad and bool(value.isfinite().all())
        law = f"{what} holds finite tensors that carry no graph, {name} too"
        require(sound, sampler, law)
    for name, value in (state.info if isinstance(state, Reporting) else {}).items():
        number = isinstance(value, Tensor) and tuple(value.shape) in [(len(x),), ()]
        law = f"{what} reports {name} as a number for each row, or one for all"
        require(number, sampler, f"{law}; it gave {description(value)}")


def _tensors(state: Any) -> dict[str, Any]:
    """A state's tensors by name; the state itself if it is not a tuple."""
    if not hasattr(state, "_asdict"):
        return {"x": state}
    fields = {**state._asdict(), **(state.info if isinstance(state, Reporting) else {})}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def check_ascent(ascent: Ascent) -> None:
    """Checks an ascent: its kernels are samplers, in both norms."""
    task = toy_task()
    norms: tuple[Ball, ...] = ("Linf", "L2")
    for norm in norms:
        kernel = ascent.kernel(toy_batch(task).x, task.radius_px, task.bounds, norm)
        made = callable(getattr(kernel, "step", None))
        require(made, ascent, f"makes a sampler: {description(kernel)}")
        check_sampler(kernel)


def check_start(spec: StartSpec) -> None:
    """Checks an initial distribution of chains."""
    task = toy_task()
    start = spec.build(task, torch.device("cpu"))
    draws = callable(getattr(start, "draw", None))
    require(draws, spec, f"builds what has `draw`: {description(start)}")
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
    """Checks a density: how samples of p(x) are drawn and how it is trained."""
    task = toy_task()
    backbone = toy_backbone(task, density=spec)
    density, model = backbone.density, backbone.model
    with untouched(model, spec):
        x = density.draw(model, 4, generator())
    require_tensor(x, spec, "what it draws", shape=(4, *task.shape))
    before = deepcopy(density.state_dict())
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
    after = deepcopy(density.state_dict())
    other = toy_backbone(task, model, spec, seed=1).density
    other.load_state_dict(before)
    other.draw(model, 4, generator())
    require(same(after, other.state_dict()), spec, "a loaded state goes on as the saved one")
    require(len(second) == 4, spec, "draws n images of the task's shape")
    energy = model(toy_batch(task).x).energy
    with untouched(model, spec), unchanged(spec, "the energies that it is given", energy.detach()):
        loss = density.loss(energy, energy[:3])
    require_tensor(loss, spec, "the loss", shape=(), attached=True)
