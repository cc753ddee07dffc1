"""Builds a recipe's parts into a run, with every check that needs no step."""

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from jemkit.backbone import Backbone
from jemkit.config.optim import OptimizerOptions
from jemkit.config.recipe import Recipe, Run
from jemkit.data import Loader, Shape, Task, Views, images_hash, steps_per_epoch
from jemkit.errors import ConfigError, DataError, MisfitError
from jemkit.models.energy import EnergyModel
from jemkit.objective import Objective, ObjectiveSpec, StatefulObjective
from jemkit.runtime import distributed, fsdp
from jemkit.runtime.microbatch import MicroBatch
from jemkit.runtime.modes import batch_norms
from jemkit.runtime.precision import Layout, device_of, memory_of
from jemkit.runtime.rng import generator
from jemkit.sampling.compile import CompiledGradient
from jemkit.sampling.density import Buffer
from jemkit.splits import Pinned, Splits
from jemkit.training import mixing, reshard
from jemkit.training.compatibility import check_adversary, check_parts
from jemkit.training.objective_contexts import compiled_chains, in_bf16
from jemkit.updaters import EMA, Stateful, StepAware, Updater

log = logging.getLogger(__name__)

State = dict[str, Any]
LONGEST = 400  # characters of torch's list of wrong names and shapes


class RunState(NamedTuple):
    """Everything that a recipe determines, ready for the first step."""

    device: torch.device
    splits: Splits
    task: Task
    rng: Generator  # of all chains
    backbone: Backbone
    objective: Objective[Any]
    optimizer: Optimizer
    updater: Updater
    ema: EMA | None
    micro: MicroBatch
    loader: Loader  # with its own generator, so that a sampler never changes the order of the data
    compiled: CompiledGradient | None = None  # computes the chains' gradients, with --compile
    twin: EnergyModel | None = None  # under --shard, what the first process looks at alone

    def state_dict(self) -> State:
        """Everything that a step changes, whole on rank 0; every process calls it."""
        own, *others = distributed.gather(self._own_state()) or [{}]
        return {
            "device": self.device.type,
            **self.weights(),
            "optimizer": fsdp.whole(self.optimizer.state_dict(), keep=leads()),
            "updater": self.updater.state_dict() if isinstance(self.updater, Stateful) else None,
            "loader": self.loader.state_dict(),
            "micro_batch": self.micro.size,
            "recompute": self.micro.recompute,
            **own,
            **({"ranks": others} if others else {}),
        }

    def _own_state(self) -> State:
        density, objective = self.backbone.density_or_none, self.objective
        remembered = objective.state_dict() if isinstance(objective, StatefulObjective) else None
        chains = density.state_dict() if density else None
        return {"density": chains, "objective": remembered, "rng": self.rng.get_state()}

    def weights(self) -> State:
        """The model's weights and their average, whole on rank 0."""
        average = self.ema.average if self.ema else None
        states = {"model": self.backbone.model.state_dict(), "ema": average}
        return fsdp.whole(states, keep=leads())  # type: ignore[no-any-return]

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """A block in which rank 0 has a whole copy of sharded weights; every process enters it."""
        weights = self.weights()
        if self.twin is None:
            yield
            return
        twin = self.twin.to(self.device)
        twin.load_state_dict(weights["model"])
        sharded, average = self.backbone.model, self.ema.average if self.ema else {}
        self.backbone.model = twin
        if self.ema is not None:
            self.ema.average = weights["ema"]
        try:
            yield
        finally:
            self.backbone.model = sharded
            if self.ema is not None:
                self.ema.average = average
            twin.to("cpu")

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        """Load whole weights, also as their average."""
        load_model(self.backbone.model, weights)
        for name, tensor in (self.ema.average if self.ema else {}).items():
            fsdp.fill(tensor, weights[name])

    def load_state_dict(self, state: State) -> None:
        """Load a whole state, with this process's part of it."""
        if state["device"] != self.device.type:
            raise ConfigError(
                f"the run was saved on {state['device']} and cannot continue bit for bit on "
                f"{self.device.type}; use --device {state['device']}, or start a new run with "
                "--init-from"
            )
        load_model(self.backbone.model, state["model"])
        if self.ema is not None:
            for name, tensor in self.ema.average.items():
                fsdp.fill(tensor, state["ema"][name])
        self._load_optimizer(state["optimizer"])
        if isinstance(self.updater, Stateful):
            self.updater.load_state_dict(state["updater"])
        self.loader.load_state_dict(state["loader"])
        density = self.backbone.density_or_none
        ended = self.loader.step >= self.task.total_steps
        own = reshard.share_of(state, self.rng.get_state(), density, ended=ended)
        if density is not None:
            density.load_state_dict(own["density"])
        if isinstance(self.objective, StatefulObjective):
            self.objective.load_state_dict(own["objective"])
        sizes = {self.micro.size, state.get("micro_batch", 0)} - {0}
        self.micro.size = min(sizes, default=0)
        self.micro.recompute |= state.get("recompute", False)
        self.rng.set_state(own["rng"])

    def _load_optimizer(self, saved: State) -> None:
        """Load its buffers and rates; its other options are the recipe's."""
        groups = self.optimizer.state_dict()["param_groups"]
        for group, was in zip(groups, saved["param_groups"], strict=True):
            rates = {"lr", "weight_decay", "momentum"} & group.keys() & was.keys()
            group.update({name: was[name] for name in rates})
        saved = fsdp.reshard_state({**saved, "param_groups": groups}, self.optimizer)
        self.optimizer.load_state_dict(saved)
        for p, state in self.optimizer.state.items():  # a fused kernel needs p's memory format
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    state[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def build_run(recipe: Recipe, pinned: Pinned | None = None, *, fill: bool = True) -> RunState:
    """Build and check, with data that match `pinned`; with `fill`, the replay buffer is filled.

    Raises ConfigError or DataError.
    """
    run, own = recipe.run, distributed.prepared(lambda: _own_parts(recipe, pinned, fill))
    objective, backbone, device = own["objective"], own["backbone"], own["device"]
    with distributed.together():
        distributed.broadcast(backbone.model.state_dict().values())
    model, twin = placed(backbone, run, own["task"])
    remembered = objective.parameters() if isinstance(objective, StatefulObjective) else ()
    parameters = [*model.parameters(), *remembered]
    optimizer = recipe.optimizer.build(
        _groups(recipe.optimizer, model, parameters), fused=fsdp.fusable(parameters)
    )
    updater = shardable(recipe.updater.build(model, optimizer), model)
    if isinstance(updater, StepAware):
        updater.total_steps = own["task"].total_steps
    unit = CompiledGradient() if run.compile else None
    if unit is not None:
        objective = compiled_chains(objective, unit)
    if run.precision == "bf16":
        narrow = in_bf16(objective, device.type)
        objective, backbone.autocast = narrow, narrow.losing
    return RunState(
        **{**own, "objective": objective},
        optimizer=optimizer,
        updater=updater,
        ema=EMA(model, run.ema_decay) if run.ema_decay else None,
        micro=MicroBatch(run.micro_batch, recompute=run.recompute),
        compiled=unit,
        twin=twin,
    )


def _own_parts(recipe: Recipe, pinned: Pinned | None, fill: bool) -> dict[str, Any]:
    """What each process builds by itself, checked."""
    run, usual = recipe.run, recipe.data.radius_px
    check_adversary(recipe.objective, usual)  # before the data is read
    device = device_of(run.device)
    splits = splits_of(recipe, pinned)
    task = replace(task_of(recipe, splits), fill=fill)
    check_adversary(recipe.objective, usual, math.prod(task.shape))
    buffer = getattr(recipe.backbone, "buffer", None)
    if isinstance(buffer, Buffer):
        buffer.check_memory(task.shape, memory_of(device))
    rng = generator(device, run.seed, "chains")
    backbone = recipe.backbone.build(task, rng)
    objective = recipe.objective
    if isinstance(objective, ObjectiveSpec):
        objective = objective.build(task, rng)
    check_parts(backbone, objective, task, run)
    if run.shard and distributed.shard().size > 1:
        fsdp.check(
            backbone.model, backbone.model.network, compiled=run.compile,
            channels_last=run.channels_last,
            by_stem=backbone.has_density and backbone.density.sampler.needs_stem,
        )  # fmt: skip
    return {
        "device": device, "splits": splits, "task": task, "backbone": backbone,
        "objective": objective, "rng": reshard.split(backbone, rng, run.seed),
        "loader": _loader(recipe, task, backbone.views, device),
    }  # fmt: skip


def _groups(
    optimizer: OptimizerOptions, model: EnergyModel, parameters: list[nn.Parameter]
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """The parameters; those of the model's batch norm apart, if they have no weight decay."""
    norms = {id(p) for norm in batch_norms(model) for p in norm.parameters()}
    if optimizer.decay_norms or not norms:
        return parameters
    decaying: dict[str, Any] = {"params": [p for p in parameters if id(p) not in norms]}
    others: dict[str, Any] = {"params": [p for p in parameters if id(p) in norms]}
    return [decaying, {**others, "weight_decay": 0.0}]


def leads() -> bool:
    """Whether this process is the first of its group, or alone."""
    return distributed.shard().rank == 0


NARROW = 16
"""Input channels of a strided 1x1 convolution below which channels last is unsafe on a CPU: the
gradient of its weights overwrites memory (oneDNN issue 6035, seen with AVX2 and torch 2.13)."""


def _unsafe(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d) and module.in_channels // module.groups < NARROW
        and max(module.kernel_size) == 1 and max(module.stride) > 1
    )  # fmt: skip


def laid_out(model: nn.Module, choice: Layout, device: torch.device) -> nn.Module:
    """Use channels last if requested. On a CPU `auto` does not use it with instance norm, which
    alone was slower with it in measurements (docs/performance.md), nor where oneDNN is unsafe."""
    on_cpu, modules = device.type == "cpu", list(model.modules())
    unsafe = on_cpu and any(_unsafe(module) for module in modules)
    if choice == "yes" and unsafe:
        raise MisfitError(
            f'run.channels_last = "yes": a strided 1x1 convolution of this network has fewer than '
            f"{NARROW} input channels, whose gradients oneDNN writes out of bounds on a CPU; use "
            f"auto or no"
        )
    slower = on_cpu and any(isinstance(module, nn.InstanceNorm2d) for module in modules)
    last = choice == "yes" or (choice == "auto" and not slower and not unsafe)
    return model.to(memory_format=torch.channels_last) if last else model  # type: ignore[call-overload]


def placed(backbone: Backbone, run: Run, task: Task) -> tuple[EnergyModel, EnergyModel | None]:
    """The model in its memory format, or sharded, with a whole twin on rank 0's host."""
    model, device = backbone.model, next(backbone.model.parameters()).device
    if not run.shard or distributed.shard().size == 1:
        if run.shard:
            log.warning(
                "run.shard shards nothing in one process; the weights are contiguous, not "
                "channels last"
            )
        laid_out(model, run.layout, device)
        return model, None
    twin = copy.deepcopy(model).to("cpu") if leads() else None
    fsdp.shard(model, torch.zeros((1, *task.shape), device=device))
    return model, twin


def shardable(updater: Updater, model: EnergyModel) -> Updater:
    """The updater, unless the weights are sharded and it has a state that cannot be."""
    if isinstance(updater, Stateful) and fsdp.is_sharded(next(model.parameters())):
        raise MisfitError(
            f"run.shard: the updater {type(updater).__name__} keeps a state of its own, which "
            "jemkit cannot shard; choose plain, sam or awp, or leave run.shard out"
        )
    return updater


def _loader(recipe: Recipe, task: Task, views: Views, device: torch.device) -> Loader:
    run, extra = recipe.run, recipe.extra
    images = task.images("train").to(device)
    rng = generator(device, run.seed, "data")
    form: dict[str, Any] = {
        "views": views, "bounds": task.bounds, "augmentation": task.augmentation,
        "shard": distributed.shard(),
    }  # fmt: skip
    if not extra.on:
        return Loader(images, run.batch_size, rng, **form)
    draws = generator(torch.device("cpu"), run.seed, "generated")
    generated = mixing.open_generated(extra, recipe.data, task, device)
    return mixing.MixedLoader(images, run.batch_size, rng, generated, draws, **form)


def splits_of(recipe: Recipe, pinned: Pinned | None = None) -> Splits:
    """The splits of a recipe's data."""
    run = recipe.run
    return Splits(
        recipe.data, valid_fraction=run.valid_fraction, max_train=run.max_train, pinned=pinned
    )


def task_of(recipe: Recipe, splits: Splits) -> Task:
    """What the parts must know of this recipe's data and length; reads the training split."""
    images = splits.images("train")
    shape: Shape = tuple(images.x.shape[1:])  # type: ignore[assignment]
    n_classes, n_train = recipe.data.n_classes, len(images.y)
    return described_task(recipe, splits, shape, n_classes, n_train, images_hash(images))


def described_task(
    recipe: Recipe, splits: Splits, shape: Shape, n_classes: int, n_train: int, hash: str
) -> Task:
    """The task of training images of which this is known; reads none."""
    steps = steps_per_epoch(n_train, recipe.run.batch_size, mixed=recipe.extra.on)
    total = steps * recipe.run.epochs
    return Task(
        shape=shape,
        n_classes=n_classes,
        radius_px=recipe.data.radius_px,
        n_train=n_train,
        total_steps=total,
        images=splits.images,
        hash=hash,
        augmentation=recipe.data.augmentation,
        lr=lambda step: recipe.optimizer.lr * recipe.schedule.factor(step, total),
    )


def load_model(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights into a model; every name and shape must match."""
    own = model.state_dict()
    try:
        model.load_state_dict({n: fsdp.like(t, own.get(n, t)) for n, t in weights.items()})
    except RuntimeError as error:
        why = " ".join(str(error).split()).partition(": ")[2]
        raise DataError(f"the weights do not fit the model: {why[:LONGEST]}") from None
