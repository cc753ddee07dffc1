"""Evaluation: a model, its attacks and evaluators, and the record of their figures."""

import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jemkit.attacks.base import ChecksImages, Threat
from jemkit.attacks.pixel_model import PixelModel, check_subject, names_of, other_types
from jemkit.attacks.purification import Refined, Refinement, refined
from jemkit.config.eval_settings import (
    Settings,
    attacks_of,
    evaluators_of,
    protocol_card,
    settings_of,
    threat_of,
)
from jemkit.config.registry import Registry, installed
from jemkit.data import Dataset, Images, checked
from jemkit.evaluation.subjects import EvalTarget, subject_of
from jemkit.metrics import record as records
from jemkit.metrics.attack_runner import as_model_attack
from jemkit.metrics.evaluator import (
    AnyAttack,
    Context,
    Evaluator,
    Unmeasurable,
    measure,
    no_progress,
)
from jemkit.metrics.figures import Figure, joined, near_chance
from jemkit.metrics.outputs import probe_outputs
from jemkit.metrics.record_file import Record
from jemkit.runtime import distributed
from jemkit.runtime.lock import in_use
from jemkit.runtime.microbatch import MicroBatch, retry_on_oom
from jemkit.runtime.modes import eval_mode, preserved_random_state
from jemkit.runtime.precision import judging
from jemkit.runtime.rng import generator
from jemkit.runtime.timing import settle
from jemkit.runtime.work_cache import WHOLE, Shard
from jemkit.selection import Part, missing_classes_warning, part_of

QUICK = 256  # number of images with --quick


def evaluate(
    model: nn.Module,
    dataset: Dataset | Images,
    *,
    n_classes: int | None = None,
    registry: Registry | None = None,
    out: Path | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    keep_adversarial: bool = False,
    **settings: Any,
) -> Record:
    """Evaluate any module that maps [0, 1] images to logits.

    `settings` are the fields of `Settings`: attacks=("aa",), eps_px=8, norm="L2", ... With a folder
    `out` the record is written there, with `keep_adversarial` the attacked images too, and an
    interrupted evaluation can be continued.
    """
    folder = None if out is None else Path(out)
    subject = subject_of(model, dataset, n_classes)._replace(folder=folder)
    chosen, parts = settings_of(settings), registry or installed()
    return judge(subject, chosen, parts, progress=progress, keep_adversarial=keep_adversarial)


def judge(
    subject: EvalTarget,
    settings: Settings,
    registry: Registry,
    *,
    shard: Shard = WHOLE,
    progress: Callable[[str, int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    keep_adversarial: bool = False,
) -> Record:
    """Run the requested evaluators; write the record after each, if it has a folder.

    Raises ConfigError or DataError before any slow work, and Preempted if `stop` returns true:
    finished batches are saved, and the same call continues.
    """
    folder = subject.folder
    if folder is not None:
        records.check_place(folder)
    evaluators = evaluators_of(settings, registry)
    attacks = attacks_of(settings, registry)
    plain = subject.model
    if settings.refine_steps:
        refinement = Refinement(steps=settings.refine_steps, seed=settings.seed)
        subject = subject._replace(model=refined(subject.model, refinement))
    test = checked(subject.test, subject.n_classes, "the test images")
    limit = QUICK if settings.quick else len(test.y)
    part = part_of(test, settings.max_images or limit, settings.selection)
    data = part.images
    ctx = _context(subject, settings, part, test, attacks)
    if (lacking := missing_classes_warning(data.y, subject.n_classes)) is not None:
        ctx.notes.warnings.append(lacking)
    ctx.notes.warnings.extend(unattacked(subject.model, attacks))
    ctx = replace(ctx, shard=shard, progress=progress or no_progress, stop=stop or bool)
    _check_attacks(attacks, subject.model, ctx.threat, data)
    cores = max(torch.get_num_threads(), os.cpu_count() or 1)
    threads = min(subject.threads or torch.get_num_threads(), cores)  # the same in all processes
    own_draws = preserved_random_state()  # a model may draw from torch's global generators
    used = nullcontext() if folder is None or not folder.exists() else in_use(folder)
    with used, judging(ctx.rng.device, threads=threads), own_draws, MicroBatch().active():
        first = data.take(torch.arange(min(len(data.y), settings.batch_size))).to(ctx.rng.device)
        with eval_mode(subject.model):
            retry_on_oom(partial(check_subject, subject.model, first.unit(), subject.n_classes))
            ctx = retry_on_oom(partial(_looked_at, plain, data, ctx))
        return _Judgement(subject, settings, ctx, data).run(evaluators, keep_adversarial)


def _check_attacks(
    attacks: Mapping[str, AnyAttack], model: PixelModel, threat: Threat, data: Images
) -> None:
    """Raise MisfitError if an attack does not support the model, the threat or the images."""
    _, channels, height, width = data.x.shape
    for name, attack in attacks.items():
        as_model_attack(attack, name).bind(model, threat)
        if isinstance(attack, ChecksImages):
            attack.check_images((channels, height, width), threat)


def _looked_at(model: PixelModel, data: Images, ctx: Context) -> Context:
    """Reject a model that outputs probabilities; attach other findings to every figure.

    Clean accuracy does not depend on the outputs' form.
    """
    ctx.progress("outputs", 0, 1)
    outputs = probe_outputs(model, data, ctx.rng.device)
    ctx.progress("outputs", 1, 1)
    row = outputs.finding
    ctx.notes.tables["outputs"] = row
    if row["flag"]:
        ctx.notes.warnings.append(f"outputs: {row['found']}. {row['means']}; {row['do']}")
    why = f"the outputs are not logits: {row['found']}" if outputs.bounded else None
    return replace(ctx, no_logits=why)


def unattacked(model: PixelModel, attacks: Collection[str]) -> list[str]:
    """Warnings that these attacks do not see all of what a model answers by."""
    hidden = [(model.model.beside_logits, model.model.attacks_beside)]
    if isinstance(model, Refined):
        text = "the model purifies its input, which can hide its gradient from attacks"
        hidden.append((text, ("bpda",)))
    return [
        f"attack surface: {text}" + (f"; add --attack {names[0]}" if names else "")
        for text, names in hidden
        if text and not set(attacks) & set(names)
    ]


class _Judgement:
    """A running evaluation."""

    def __init__(self, subject: EvalTarget, settings: Settings, ctx: Context, data: Images) -> None:
        self.subject, self.settings = subject, settings
        self.ctx, self.data = ctx, data
        self.ctx.notes.warnings.extend(subject.warnings)
        self.figures: list[Figure] = []
        self.left_out: dict[str, str] = {}
        self.parts: list[records.Part] = []

    def run(self, evaluators: Mapping[str, Evaluator], keep_adversarial: bool) -> Record:
        for name, evaluator in evaluators.items():
            try:
                before = records.left_by(self.ctx.notes)
                figures = self._figures(name, evaluator)
                self.figures += figures
                self.parts.append(records.part(name, figures, self.ctx, before))
            except Unmeasurable as error:
                if name in self.settings.only:
                    raise
                self.left_out[name] = str(error)
            self._write()
        if keep_adversarial:
            self._write(adversarial=True)
        distributed.barrier(self.ctx.poll)  # other processes may still read it
        for cache in self.ctx.notes.caches:
            cache.remove()
        return self.record()

    def record(self) -> Record:
        notes = self.ctx.notes
        return records.arranged(Record(
            self.subject.about, self.ctx.card, list(self.figures), dict(notes.tables),
            dict(notes.rows), dict(self.left_out), list(notes.warnings), list(self.parts),
        ))  # fmt: skip

    def _figures(self, name: str, evaluator: Evaluator) -> list[Figure]:
        rng = generator(self.ctx.rng.device, self.settings.seed, name)
        card = {**self.ctx.card, "evaluator": name}
        if self.ctx.no_logits and name != "accuracy":
            card = joined(card, {"standard": False, "why": self.ctx.no_logits})
        ctx = replace(self.ctx, rng=rng, card=card)
        settle(rng.device)
        began = time.monotonic()
        figures = measure(self.subject.model, self.data, [evaluator], ctx)
        settle(rng.device)
        took = {"seconds": round(time.monotonic() - began, 3)}  # an attack computes its own
        figures = [f._replace(protocol={**ctx.card, **took, **f.protocol}) for f in figures]
        if name == "accuracy" and near_chance(figures[0].value, self.subject.n_classes):
            self.ctx.notes.warnings.append(
                f"clean accuracy is {figures[0].value:.1%}, close to chance for "
                f"{self.subject.n_classes} classes: is the preprocessing inside the model?"
            )
        return figures

    def _write(self, *, adversarial: bool = False) -> None:
        folder, notes = self.subject.folder, self.ctx.notes
        if folder is not None and self.ctx.shard.rank == 0:
            records.save(folder, self.record(), notes, adversarial=adversarial)


def _context(
    subject: EvalTarget,
    settings: Settings,
    part: Part,
    test: Images,
    attacks: Mapping[str, AnyAttack],
) -> Context:
    data = part.images
    device = next((p.device for p in subject.model.parameters()), torch.device("cpu"))
    threat = threat_of(settings, subject.radius_px, data.x.shape[1:].numel())
    card = protocol_card(settings, threat, subject.about, part, test, device)
    if subject.trained_on:
        card |= {"standard": False, "trained_on": subject.trained_on}
    if others := other_types(subject.model):
        card["weight_types"] = names_of(others)
    if isinstance(subject.model, Refined):
        card |= subject.model.card
    return Context(
        generator(device, settings.seed),
        threat,
        seed=settings.seed,
        batch_size=settings.batch_size,
        card=card,
        code=subject.about["sha256"],
        attacks=attacks,
        images=subject.images,
        held_out=subject.known_splits,
        others=subject.others,
        quick=settings.quick,
        work=None if subject.folder is None else subject.folder / records.WORK,
    )
