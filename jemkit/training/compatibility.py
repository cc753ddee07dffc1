"""Parts that do not fit together, rejected before the first step."""

import logging
from typing import Any, get_args

import torch

from jemkit.attacks.base import ForTraining, InBall, Norm, Threat, check_width, radius_of
from jemkit.backbone import Backbone, check_stem
from jemkit.config.recipe import Run
from jemkit.config.registry import installed
from jemkit.data import Task, positives
from jemkit.errors import ConfigError, MisfitError
from jemkit.models.distances import Distance
from jemkit.models.norms import SyncBatchNorm
from jemkit.objective import ChecksBackbone, Conditional, NamesStreams, Objective
from jemkit.options import Options, parts_of
from jemkit.runtime import distributed
from jemkit.runtime.microbatch import can_recompute
from jemkit.runtime.modes import eval_mode
from jemkit.sampling.density import Buffered

log = logging.getLogger(__name__)


def check_parts(backbone: Backbone, objective: Objective[Any], task: Task, run: Run) -> None:
    """Reject, before the first step, whatever in a run does not fit together."""
    check(backbone, objective)
    if backbone.views.cutmix and not getattr(objective, "mixes_labels", False):
        raise MisfitError(
            f"backbone.views.cutmix mixes labels, which the objective "
            f"{_name('objective', objective)} does not take; choose trades or score, or omit it"
        )
    check_distances(objective, task, backbone)
    chains = positives(min(run.batch_size, task.n_train), backbone.views)
    check_chains(objective, backbone, chains)
    if isinstance(objective, NamesStreams):
        backbone.check_learning(objective.streams)
    processes = distributed.shard().size
    synced = any(isinstance(m, SyncBatchNorm) for m in backbone.model.modules())
    if run.compile and processes > 1 and synced:
        raise MisfitError(
            f"run.compile: batch norm over {processes} processes communicates inside each pass, "
            'which cannot be part of a compiled graph; omit --compile, or set norm = "batch"'
        )
    if run.precision == "tf32" and not next(backbone.model.parameters()).is_cuda:
        log.warning("run.precision: tf32 needs a GPU; this run would compute in fp32")
    if run.recompute and not can_recompute(backbone.model.network):
        raise MisfitError(
            "run.recompute: this network does not support activation checkpointing; omit it, "
            "choose a wrn, or set run.micro_batch if no norm uses batch statistics"
        )


def check_adversary(objective: Any, usual_px: float, pixels: int | None = None) -> None:
    """Reject an attack that cannot train, and a ball whose norm has no radius.

    Given the number of values of an image, also a radius wider than the pixel range.
    """
    for path, part in parts_of(objective, "objective"):
        if isinstance(part, ForTraining):
            part.check_training()
        if isinstance(part, InBall) and part.norm in get_args(Norm):
            option = f"{path}.radius_px"
            radius = radius_of(part.norm, part.radius_px, usual_px, option)
            if pixels is not None:
                check_width(Threat(part.norm, radius), pixels, option)


def trained_threat(objective: Any, usual_px: float) -> Threat | None:
    """The ball in which an objective trains; None if it perturbs no image."""
    for _, part in parts_of(objective):
        if isinstance(part, InBall) and part.norm in get_args(Norm):
            return Threat(part.norm, usual_px if part.radius_px is None else part.radius_px)
    return None


def check(backbone: Backbone, objective: Objective[Any]) -> None:
    """Reject, before the first step, parts that do not fit together, with a MisfitError."""
    if objective.needs_density and not backbone.has_density:
        raise MisfitError(
            f"the objective {_name('objective', objective)} learns p(x), and this backbone "
            "has no density; choose a backbone with a density, or an objective that needs none: "
            "`jemkit plugins list` lists all"
        )
    if isinstance(objective, ChecksBackbone):
        objective.check_backbone(backbone)
    if backbone.has_density:
        check_stem(backbone.density.sampler, backbone.model.network)


def check_distances(objective: Objective[Any], task: Task, backbone: Backbone) -> None:
    """Reject a distance whose weights are missing, or that needs larger images."""
    idle = objective.unused() if isinstance(objective, Options) else {}
    for path, distance in parts_of(objective):
        if not isinstance(distance, Distance) or path.partition(".")[0] in idle:
            continue
        if task.shape[1] < distance.min_size:
            raise MisfitError(
                f"the distance {_name('distance', distance)} needs images of at least "
                f"{distance.min_size} px; these have {task.shape[1]}. Choose another "
                f"objective.{path}, such as none, l2 or logits"
            )
        device = next(backbone.model.parameters()).device
        x = task.bounds.from_unit(task.images("train").take(torch.arange(1)).unit()).to(device)
        with torch.no_grad(), eval_mode(backbone.model):
            distance.bind(backbone.model, x, task.bounds)


def check_chains(objective: Objective[Any], backbone: Backbone, chains: int) -> None:
    """Reject a buffer too small for a step, or without classes if some are requested."""
    density = backbone.density_or_none
    if not isinstance(density, Buffered):
        return
    buffer = density.buffer.options
    if chains > buffer.capacity:
        raise ConfigError(
            f"each step starts {chains} chains, but the buffer has {buffer.capacity} slots: raise "
            "backbone.buffer.capacity or lower run.batch_size"
        )
    if isinstance(objective, Conditional) and objective.conditional and not buffer.conditional:
        raise MisfitError(
            "chains of given classes need a class-conditional buffer: set "
            "backbone.buffer.conditional = true"
        )


def _name(kind: str, part: Any) -> str:
    """The name of one of jemkit's parts in a recipe; of any other part, its class."""
    known = installed(third_party=False)[kind].items()
    return next((repr(name) for name, own in known if own is type(part)), type(part).__name__)
