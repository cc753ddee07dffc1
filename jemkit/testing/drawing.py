"""Conformance checks of samplers, ascents, initial distributions and densities."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jemkit.attacks.ascent import Ascent
from jemkit.models.energy import EnergyFn, EnergyModel, ModelEnergy
from jemkit.runtime.modes import eval_mode
from jemkit.runtime.pytree import same
from jemkit.sampling.density import Density, DensitySpec
from jemkit.sampling.init_dists import StartSpec, Uniform
from jemkit.sampling.kernels import Ball, Reporting, Sampler, begin, chain, last, noise_like
from jemkit.testing.analytic import (
    AnalyticEnergy,
    DoubleWellEnergy,
    GaussianEnergy,
    MixtureEnergy,
    RingEnergy,
    analytic_model,
)
from jemkit.testing.law import (
    gave,
    generator,
    require,
    require_own_generator,
    require_tensor,
    unchanged,
    untouched,
)
from jemkit.testing.toys import at_box, toy_backbone, toy_batch, toy_model, toy_task

CHAINS, EXACT = 256, 4096  # that a test of the mean drift, and of stationary moments, runs
SIGMAS = 5.0  # standard errors by which a mean may be off


def check_sampler(sampler: Sampler) -> None:
    """Checks a transition kernel, with or without a state.

    One that declares `exact = True` must leave exp(-E / temperature) as it is: the moments of four
    analytic densities are tested within five standard errors. Its `temperature` is 1 by default.
    """
    require(isinstance(sampler.needs_stem, bool), sampler, "interface", "says if it needs a stem")
    task = toy_task()
    model, x = toy_model(task), toy_batch(task).x
    with eval_mode(model):
        _check_step(sampler, model, x)
        _check_chain(sampler, ModelEnergy(model), x)
        corners = at_box(x, task.bounds)
        with untouched(model, sampler):
            moved = _tensors(_after(sampler, ModelEnergy(model), corners, 2))["x"]
    law = "stays finite where pixels are at the ends of their range"
    require(bool(moved.isfinite().all()), sampler, "box", law)
    check_descent(sampler, sampler)
    if getattr(sampler, "exact", False):
        _check_stationary(sampler)


def _check_step(sampler: Sampler, model: EnergyModel, x: Tensor) -> None:
    energy = ModelEnergy(model)
    with unchanged(sampler, "the images that it is given", x), untouched(model, sampler):
        state = begin(sampler, x, generator())
        _check_state(sampler, state, x, "the state that `init` gives")
    given = [t for t in _tensors(state).values() if t is not x]
    images = unchanged(sampler, "the images that it is given", x)
    inputs_unchanged = unchanged(sampler, "the state that it is given", *given)
    with images, inputs_unchanged, untouched(model, sampler):
        moved = sampler.step(energy, state, generator())
    _check_state(sampler, moved, x, "the state after a step")
    law = "a step gives a state as `init` does"
    require(type(moved) is type(state), sampler, "interface", law, gave(moved))
    again = sampler.step(energy, state, generator())
    law = "one state and one generator give one next state"
    require(same(again, moved), sampler, "deterministic", law)


def _after(sampler: Sampler, energy: EnergyFn, x: Tensor, steps: int) -> Any:
    rng = generator()
    state = begin(sampler, x, rng)
    for _ in range(steps):
        state = sampler.step(energy, state, rng)
    return state


def _check_chain(sampler: Sampler, energy: EnergyFn, x: Tensor) -> None:
    other = torch.cat([x[:-1], -x[-1:]])
    ours, theirs = (_tensors(_after(sampler, energy, z, 2))["x"][:-1] for z in (x, other))
    law = "moves each row by itself: another row's image changes nothing"
    apart = f"it moved another row by {float((ours - theirs).abs().amax()) if len(ours) else 0:.2g}"
    require(torch.allclose(ours, theirs, atol=1e-6), sampler, "rows", law, apart)
    states = list(chain(sampler, energy, x, generator(), 3))
    law = "a chain has as many states as steps"
    require(len(states) == 3, sampler, "interface", law)
    law = "remembers nothing but its state: two chains from one generator are one"
    repeated = torch.equal(states[-1], _tensors(_after(sampler, energy, x, 3))["x"])
    require(repeated, sampler, "deterministic", law)
    detached = not any(s.requires_grad for s in [*states, last(iter(states), x)])
    require(detached, sampler, "detached", "what leaves a chain carries no graph")


def check_descent(sampler: Sampler, part: object) -> None:
    """Checks that chains on a constant slope do not climb it on average."""
    x = torch.rand((CHAINS, 1, 4, 4), generator=generator()) * 2 - 1
    slope = 10 * noise_like(x[:1], generator(1))
    energy = ModelEnergy(analytic_model(lambda z: (z * slope).flatten(1).sum(1)))
    climbed = ((_tensors(_after(sampler, energy, x, 3))["x"] - x) * slope).flatten(1).sum(1)
    error = float(climbed.std()) / CHAINS**0.5
    law = "moves towards low energy: chains on a constant slope do not climb it on average"
    result = f"E rose by {float(climbed.mean()):.2g} +- {error:.1g} in 3 steps of {CHAINS} chains"
    require(float(climbed.mean()) <= SIGMAS * error, part, "descent", law, result)


def _check_stationary(sampler: Any) -> None:
    """Chains from samples of a density remain samples of it."""
    temperature = float(getattr(sampler, "temperature", 1.0))
    flat = ModelEnergy(analytic_model(lambda z: 0 * z.flatten(1).sum(1)))
    nowhere = torch.zeros((EXACT, 2, 1, 1))
    width = float(_tensors(_after(sampler, flat, nowhere, 1))["x"].std())
    moves = width > 0
    require(moves, sampler, "stationary", "moves where the energy is flat, as exact chains do")
    for density in (GaussianEnergy(), MixtureEnergy(), DoubleWellEnergy(), RingEnergy()):
        name = type(density).__name__.removesuffix("Energy").lower()
        energy = ModelEnergy(analytic_model(partial(_scaled, density, width, temperature)))
        x = width * density.sample(EXACT, generator(1))
        ends = _tensors(_after(sampler, energy, x, 10))["x"] / width
        for what, known in density.moments.items():
            values = density.measured(what, ends)
            error = float(values.std()) / EXACT**0.5
            law = f"is exact: leaves the moments of the {name} as they are, within 5 errors"
            result = f"{what} is {float(values.mean()):.3f} +- {error:.1g}, and not {known:.3f}"
            off = abs(float(values.mean()) - known)
            require(off <= SIGMAS * error, sampler, "stationary", law, result)


def _scaled(density: AnalyticEnergy, width: float, temperature: float, x: Tensor) -> Tensor:
    return temperature * density(x / width)


def _check_state(sampler: Sampler, state: Any, x: Tensor, what: str) -> None:
    """x itself of a kernel without memory, else a named tuple that begins with x."""
    if isinstance(state, tuple):
        law = f"{what} is a named tuple whose first field is x"
        require(getattr(state, "_fields", ())[:1] == ("x",), sampler, "interface", law)
    tensors = _tensors(state)
    require_tensor(tensors.get("x"), sampler, what, shape=tuple(x.shape))
    for name, value in tensors.items():
        law = f"{what} holds finite tensors that carry no graph, {name} too"
        require(not value.requires_grad, sampler, "detached", law)
        require(bool(value.isfinite().all()), sampler, "finite", law)
    for name, value in (state.info if isinstance(state, Reporting) else {}).items():
        number = isinstance(value, Tensor) and tuple(value.shape) in [(len(x),), ()]
        law = f"{what} reports {name} as a number for each row, or one for all"
        require(number, sampler, "shape", law, gave(value))


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
        require(made, ascent, "interface", "makes a sampler", gave(kernel))
        check_sampler(kernel)


def check_start(spec: StartSpec) -> None:
    """Checks an initial distribution of chains."""
    task = toy_task()
    start = spec.build(task, torch.device("cpu"))
    draws = callable(getattr(start, "draw", None))
    require(draws, spec, "interface", "builds what has `draw`", gave(start))
    random = torch.get_rng_state()
    for y in (None, torch.arange(5) % task.n_classes):
        with unchanged(spec, "the labels that it is given", *([] if y is None else [y])):
            x = start.draw(5, generator(), y)
        require_tensor(x, spec, "what it draws", shape=(5, *task.shape))
        inside = task.bounds.low <= float(x.min()) and float(x.max()) <= task.bounds.high
        require(inside, spec, "range", "draws inside the model's range")
        again = start.draw(5, generator(), y)
        require(torch.equal(x, again), spec, "deterministic", "one generator gives one draw")
    other = torch.equal(start.draw(5, generator(0)), start.draw(5, generator(1)))
    require(not other, spec, "generator", "another generator gives another draw")
    require_own_generator(random, spec)
    none = start.draw(0, generator())
    require(len(none) == 0, spec, "shape", "can be asked for no image at all")


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
    require(same(before, density.state_dict()), spec, "resume", law)
    density.mark()
    first, second = density.draw(model, 4, generator()), density.draw(model, 4, generator(1))
    density.rollback()
    law = "a rollback undoes every draw since the mark"
    require(same(before, density.state_dict()), spec, "resume", law)
    repeat = density.draw(model, 4, generator())
    require(
        torch.equal(first, repeat),
        spec,
        "deterministic",
        "one state and one generator give one draw",
    )
    density.load_state_dict(before)
    density.draw(model, 4, generator())
    after = deepcopy(density.state_dict())
    other = toy_backbone(task, model, spec, seed=1).density
    other.load_state_dict(before)
    other.draw(model, 4, generator())
    law = "a loaded state goes on as the saved one"
    require(same(after, other.state_dict()), spec, "resume", law)
    require(len(second) == 4, spec, "shape", "draws n images of the task's shape")
    check_density_loss(density, model, spec)


def check_density_loss(density: Density, model: EnergyModel, spec: object) -> None:
    """Checks the loss of a density: it lowers the energy of data against that of negatives."""
    energy = model(toy_batch(toy_task()).x).energy
    with untouched(model, spec), unchanged(spec, "the energies that it is given", energy.detach()):
        loss = density.loss(energy, energy[:3])
    require_tensor(loss, spec, "the loss of the density", shape=(), attached=True)
    data, negative = (energy.detach().clone().requires_grad_() for _ in range(2))
    pulls = torch.autograd.grad(density.loss(data, negative), [data, negative], allow_unused=True)
    up, down = (0.0 if pull is None else float(pull.sum()) for pull in pulls)
    law = "the loss of the density rises with E(x+) and falls with E(x-)"
    result = f"its slopes are {up:.2g} and {down:.2g}"
    require(up >= 0 >= down, spec, "descent", law, result)
