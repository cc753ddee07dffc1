"""Images of a trained run: new chains of its density, or the states of its replay buffer."""

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from jemkit.backbone import Backbone
from jemkit.config.recipe import Run
from jemkit.config.registry import Registry
from jemkit.data import Task
from jemkit.errors import ConfigError, MisfitError, Preempted, UsageError
from jemkit.metrics.evaluator import Progress, no_progress
from jemkit.metrics.plots import save_grid, to_bytes
from jemkit.objective import Conditional
from jemkit.options import nearest
from jemkit.runtime import distributed
from jemkit.runtime.files import write_bytes
from jemkit.runtime.microbatch import MicroBatch
from jemkit.runtime.opening import refuse_link
from jemkit.runtime.precision import as_trained, device_of
from jemkit.runtime.preemption import PreemptionCheck
from jemkit.runtime.rng import generator
from jemkit.runtime.run_dir import versions
from jemkit.runtime.work_cache import WHOLE, Piece, ResultCache, Shard
from jemkit.sampling.density import Buffered, Classwise, together
from jemkit.sampling.fresh import even_batches, in_batches
from jemkit.sampling.init_dists import MomentStart, Start, start_name
from jemkit.training.opened import Opened, Which, open_model
from jemkit.training.pinned import SAMPLED
from jemkit.training.reshard import gather_state
from jemkit.training.restore import Restored, restored

STEPS = 40  # of a fresh chain, where none are given


class Samples(NamedTuple):
    """Images, and the protocol of how they were drawn."""

    pixels: Tensor  # [N, C, H, W], float32 in [0, 1]
    y: Tensor | None  # [N], the requested classes
    protocol: dict[str, Any]


def sample(path: Path, *, registry: Registry, **request: Any) -> Samples:
    """Draw images from the run or the exported model in `path`; see `sample_request`."""
    return draw_samples(sample_request(path, registry=registry, **request))


class SampleSource(NamedTuple):
    """A model with a density."""

    task: Task
    table: dict[str, Any]  # [backbone] of the run's recipe
    backbone: Backbone
    state: dict[str, Any] | None  # contents of the checkpoint; None for an exported model
    card: dict[str, Any]  # the origin of the model
    run: Run  # with precision and switches of the chains
    conditional: bool  # whether its chains were class-conditional
    classes: tuple[str, ...] = ()  # names in the order of the labels, if known


class SampleRequest(NamedTuple):
    """Images to draw, with everything on which they depend."""

    run: SampleSource
    n: int
    steps: int
    start: Start | None  # None: states of the buffer
    y: Tensor | None  # [N]
    seed: int
    device: torch.device
    protocol: dict[str, Any]


def sample_request(
    path: Path,
    *,
    registry: Registry,
    n: int = 100,
    steps: int | None = None,
    start: str | None = None,
    source: Literal["chains", "buffer"] = "chains",
    classes: list[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    which: Which = "best",
    dataset: dict[str, Any] | None = None,
) -> SampleRequest:
    """n images to draw; requests that cannot be fulfilled are rejected here.

    `dataset` is the current location of the training images, for initial distributions that need
    them. With `classes`, chains descend E(x, y), and the images are distributed evenly over the
    classes in order.
    """
    _check_numbers(n, steps, start, source)
    on = device_of(device)
    run = opened(path, registry, on, which, dataset)
    return request_of(
        run, on, registry, n=n, steps=steps, start=start, source=source, classes=classes, seed=seed
    )


def _check_numbers(n: int, steps: int | None, start: str | None, source: str) -> None:
    if n < 1:
        raise UsageError(f"{n} images: expected 1 or more")
    if steps is not None and steps < 0:
        raise UsageError(f"chains of {steps} steps: expected 0 or more")
    if source == "buffer" and (steps is not None or start is not None):
        raise ConfigError("steps and start apply to new chains only, not to states of the buffer")


def request_of(
    run: SampleSource,
    on: torch.device,
    registry: Registry,
    *,
    n: int,
    steps: int | None = None,
    start: str | None = None,
    source: Literal["chains", "buffer"] = "chains",
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> SampleRequest:
    """The same for a model that is open, on the device `on`."""
    _check_numbers(n, steps, start, source)
    y = _labels(classes or (), n, run, on)
    p0: Start | None = None
    if source == "buffer":
        steps, how = 0, {"source": "buffer", "start": "buffer", "steps": 0}
    else:
        steps, density = STEPS if steps is None else steps, run.backbone.density
        joint = y is not None or isinstance(density, Classwise)
        how = {
            "source": "chains",
            "start": start or run.table.get("start", {}).get("use", "the backbone's"),
            "steps": steps,
            "energy": "E(x, y)" if joint else "E(x)",
            "together": together(density, run.backbone.model, even_batches(n)),
        }
        p0 = density.start if start is None else registry["start"][start]().build(run.task, on)
    in_order = None if y is None else list(dict.fromkeys(y.tolist()))
    about = {"class": in_order, "images": n, "seed": seed}
    if isinstance(p0, MomentStart) and p0.form.rank is not None:
        how["start"] = start_name(p0)
    protocol = {**how, **run.card, **about, "device": on.type}
    return SampleRequest(run, n, steps, p0, y, seed, on, protocol)


def draw_samples(
    request: SampleRequest,
    *,
    work: Path | None = None,
    shard: Shard = WHOLE,
    stop: Callable[[], bool] = bool,
    progress: Progress = no_progress,
) -> Samples:
    """Draw the requested images; `progress` is called with "samples", the number done, the total.

    With a folder `work` every finished batch of chains is cached until the last one is done: a stop
    loses only the current batch, and each process of a group draws its `shard`.
    """
    how, bounds = request.run.run, request.run.task.bounds
    if request.start is None:
        x = _from_buffer(request)
    else:
        with as_trained(
            request.device.type, how.precision, deterministic=how.deterministic, threads=how.threads
        ):
            x = _fresh(request, request.start, work, shard, stop, progress)
    return Samples(bounds.to_unit(bounds.clamp(x)).cpu(), request.y, request.protocol)


def save(samples: Samples, out: Path | None = None) -> tuple[Path, Path]:
    """Write a PNG grid and an .npz of the images; the file names contain a hash of the protocol.

    The .npz has `image` [N, H, W, C] in 0..255, `label` [N] if classes were requested, and
    `protocol`, a JSON string.
    """
    text = json.dumps(samples.protocol, sort_keys=True)
    folder = place(samples.protocol, out)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{samples.protocol['source']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    png, npz = folder / f"{stem}.png", folder / f"{stem}.npz"
    images = to_bytes(samples.pixels).permute(0, 2, 3, 1).numpy()
    arrays: dict[str, Any] = {"image": images, "protocol": np.array(text)}
    if samples.y is not None:
        arrays["label"] = samples.y.cpu().numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    save_grid(png, samples.pixels)
    write_bytes(npz, buffer.getvalue())
    return png, npz


def place(protocol: dict[str, Any], out: Path | None) -> Path:
    """The folder to write to: by default the run's own."""
    if out is not None:
        return out
    folder = Path(protocol["run"]) / "samples"
    refuse_link(folder)
    return folder


def _labels(
    classes: Sequence[str], n: int, run: SampleSource, device: torch.device
) -> Tensor | None:
    """The class of each image: the requested classes, in blocks as even as n allows."""
    if not classes:
        return None
    every = range(run.task.n_classes)
    wanted = [*every] if "all" in classes else [_label(text, run) for text in classes]
    twice = [label for label in wanted if wanted.count(label) > 1]
    if twice:
        raise UsageError(f"class {twice[0]} is requested twice; request each class once")
    labels = torch.tensor(wanted, device=device)
    return labels[torch.arange(n, device=device) * len(labels) // n]


def _label(text: str, run: SampleSource) -> int:
    """A class from its number or its name."""
    last = run.task.n_classes - 1
    if text.isdecimal() and len(text) < 10 and int(text) <= last:
        return int(text)
    if text in run.classes:
        return run.classes.index(text)
    names = f", a class name{nearest(text, run.classes)}" if run.classes else ""
    raise ConfigError(f"class {text!r}: expected a number of 0..{last}{names}, or all")


def _from_buffer(request: SampleRequest) -> Tensor:
    """n states of the buffer; of the classes y if the buffer is class-conditional."""
    run, density = request.run, request.run.backbone.density
    if run.state is None:
        raise MisfitError(
            "an exported model has no buffer; draw new chains, or sample from the run"
        )
    if not isinstance(density, Buffered):
        raise MisfitError("this density has no buffer; draw new chains instead")
    density.load_state_dict(gather_state(run.state, density))
    buffer, rng = density.buffer, Generator(request.device).manual_seed(request.seed)
    there, wanted, of = buffer.options.capacity, request.n, "states"
    if request.y is not None and buffer.options.conditional:
        if not run.conditional:
            raise MisfitError(
                "the buffer has a slice for each class, but the run's chains were unconditional. "
                "Draw new chains of the classes instead"
            )
        there, wanted = there // run.task.n_classes, int(request.y.bincount().max())
        of = "states of one class"
    if wanted > there:
        raise UsageError(
            f"{wanted} {of} from a buffer that has {there}: request fewer, or draw new chains"
        )
    return buffer.states[buffer.slots(request.n, rng, request.y)]


def _fresh(
    request: SampleRequest,
    start: Start,
    work: Path | None,
    shard: Shard,
    stop: Callable[[], bool],
    progress: Progress,
) -> Tensor:
    """The final states of n chains, each batch from its own generator."""
    run, model, most = request.run, request.run.backbone.model, max(1, request.steps)
    y = None if request.y is None else request.y.tolist()
    about = {"request": request.protocol, "backbone": run.table, "data": run.task.hash, "y": y}
    cache = ResultCache(work, about, shard)
    polling = PreemptionCheck(lambda: stop(), lambda: 0)

    def report(done: int) -> None:
        progress("samples", done, request.n)

    def draw(rows: slice, rng: Generator) -> Piece:
        n, y = rows.stop - rows.start, None if request.y is None else request.y[rows]
        passes = itertools.count(1)  # a chain's step takes one

        def begun(*_: Any) -> None:
            report(rows.start + n * min(next(passes), request.steps) // most)

        with model.register_forward_pre_hook(begun):
            sample = run.backbone.density.sample
            return {"x": sample(model, n, rng, steps=request.steps, start=start, y=y)}

    generators = partial(generator, request.device, request.seed, "sample")
    try:
        with polling.passes(model, on=True), MicroBatch().active():
            x = in_batches(
                even_batches(request.n), draw, generators,
                cache=cache, poll=polling.between, done=report,
            )["x"]  # fmt: skip
        distributed.barrier(polling.between)  # other processes may still read it
    except Preempted:
        raise Preempted(
            "stopped; finished batches are saved, and the same command continues"
        ) from None
    cache.remove()
    return x


def opened(
    path: Path,
    registry: Registry,
    device: torch.device,
    which: Which,
    dataset: dict[str, Any] | None = None,
) -> SampleSource:
    """The model at `path`, with averaged weights if it has them.

    `dataset` is the current location of the training images, if the initial distribution needs
    them.
    """
    model = open_model(path, which)
    source = restored(model, registry, device, dataset, advice=SAMPLED, same_data=True)
    return source_of(model, source)


def source_of(model: Opened, source: Restored) -> SampleSource:
    """What was opened and restored, for sampling."""
    table, backbone = source.tables["backbone"], source.backbone
    if not backbone.has_density:
        raise MisfitError(
            f"the model's backbone is {table['use']!r}, a classifier without a density, which "
            f"cannot be sampled. Train jem, jempp, mebm or sadajem"
        )
    sampler = table.get("sampler", type(backbone.density.sampler).__name__)
    run, objective = source.recipe.run, source.recipe.objective
    conditional = isinstance(objective, Conditional) and objective.conditional
    switches = {name: getattr(run, name) for name in ("precision", "deterministic", "threads")}
    where = {**model.about, "run": str(model.folder.resolve())}
    card = {**where, "sampler": sampler, **switches, "versions": versions()}
    names = source.pin.table.classes if source.pin is not None else None
    return SampleSource(
        source.task, table, backbone, model.state, card, run, conditional, names or ()
    )
