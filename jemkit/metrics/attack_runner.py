"""The attack runner: stages on the images still classified correctly, cached batch by batch."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from jemkit.attacks.base import Attack, ModelAttack, Perturb, Threat
from jemkit.attacks.departures import departures, with_departures
from jemkit.attacks.pgd import cross_entropy
from jemkit.attacks.pixel_model import UNIT, PixelModel
from jemkit.data import Images
from jemkit.errors import MisfitError, NotFinite
from jemkit.metrics.evaluator import AnyAttack, Context, batches, no_progress
from jemkit.metrics.figures import Figure, joined, share
from jemkit.metrics.identity import code_of
from jemkit.runtime.microbatch import retry_on_oom
from jemkit.runtime.modes import preserved_random_state, seeded_random_state
from jemkit.runtime.timing import settle
from jemkit.runtime.work_cache import Piece, ResultCache, tensors_hash

SLACK = 1e-5  # tolerance of the radius for rounding, relative and in [0, 1] units


class Attacked(NamedTuple):
    """The result of an attack on a set of images."""

    label: str
    x_adv: Tensor  # [N, C, H, W] in [0, 1], on the CPU; a clean image where it was not attacked
    right: Tensor  # [N], still classified correctly after every stage
    stages: dict[str, float]  # accuracy after each
    protocol: dict[str, Any]
    passes: int = 0  # forward passes per image; a gradient counts as two


def attacked(
    subject: PixelModel, attack: AnyAttack, data: Images, ctx: Context, name: str = "attack"
) -> Attacked:
    """Run an attack on labelled images within `ctx.threat`.

    Each batch is seeded by the seed, as in AutoAttack, so its result depends only on the seed, the
    batch size and its images: batches may be read from `ctx.work` after a kill, or be computed by
    another process of `ctx.shard`. The caller sets the mode of the model: call it inside `measure`.
    A cached batch is used only for an equal model: equal weights, buffers, code, plain attributes,
    `repr` and pixel range.
    """
    whole = as_model_attack(attack, name)
    first = data.take(slice(1)).to(ctx.rng.device)
    with torch.no_grad(), preserved_random_state():
        n_classes = subject(first.unit()).shape[1]
    own = {"attack": name, **ctx.threat._asdict(), **whole.card(ctx.threat, n_classes)}
    if code := code_of(attack):
        own["implementation"] = code
    card = {**joined(ctx.card, own), "batch_size": ctx.batch_size}
    protocol = with_departures(card, departures(attack, ctx.threat))
    cache = ctx.result_cache({**_fingerprint(subject, attack, data, ctx, name), "card": own})
    run = AttackRun(subject, data, ctx, cache, name)
    stages = run.run(whole.bind(subject, ctx.threat), everyone=whole.everyone)
    x, x_adv = data.unit().cpu(), run.x_adv
    protocol["accuracy_after"] = stages
    protocol["max_delta_px"] = check_bound(x, x_adv, ctx.threat, name)
    protocol["seconds"] = round(run.seconds, 3)  # of all batches, from all processes
    return Attacked(whole.label, x_adv, run.right, stages, protocol, run.passes)


def robust_share(attacked_images: Attacked, ctx: Context) -> Figure:
    """Accuracy under an attack; the outcome of each image goes to the notes."""
    ctx.notes.rows[attacked_images.label] = attacked_images.right
    ctx.notes.adversarial[attacked_images.label] = attacked_images.x_adv
    return share(
        attacked_images.label,
        int(attacked_images.right.sum()),
        len(attacked_images.right),
        attacked_images.protocol,
    )


class AttackRun:
    """One attack on all images.

    Clean predictions are cached like a batch, and a batch's name contains a hash of its images: so
    all processes, and a resumed run, attack the same images.
    """

    def __init__(
        self, subject: PixelModel, data: Images, ctx: Context, cache: ResultCache, name: str
    ) -> None:
        self.subject, self.data, self.ctx, self.cache, self.name = subject, data, ctx, cache, name
        self.x_adv, self.seconds, self.passes = data.unit().cpu().clone(), 0.0, 0
        (clean,) = cache.pieces(["clean"], self._clean, ctx.poll, no_progress)
        self.right = clean["right"].bool()

    def run(self, stages: Mapping[str, Perturb], *, everyone: bool) -> dict[str, float]:
        """The accuracy after each stage; the first attacks `everyone`, or the correct images."""
        accuracy = {}
        for at, (stage, perturb) in enumerate(stages.items()):
            whole = everyone and at == 0
            index = torch.arange(len(self.right)) if whole else self.right.nonzero().squeeze(1)
            self._stage(at, stage, perturb, index)
            accuracy[stage] = int(self.right.sum()) / len(self.right)
        return accuracy

    def _stage(self, at: int, stage: str, perturb: Perturb, index: Tensor) -> None:
        parts = torch.split(index, self.ctx.batch_size) if len(index) else ()

        def compute(b: int) -> Piece:
            before = b * self.ctx.batch_size
            return self._batch(
                parts[b], perturb, lambda: self.ctx.progress(stage, before, len(index))
            )

        def done(b: int) -> None:
            self.ctx.progress(stage, min(b * self.ctx.batch_size, len(index)), len(index))

        hashes = [hashlib.sha256(part.contiguous().numpy().data).hexdigest()[:8] for part in parts]
        names = [f"{at}-{b:05d}-{part}" for b, part in enumerate(hashes)]
        pieces = self.cache.pieces(names, compute, self.ctx.poll, done)
        for part, piece in zip(parts, pieces, strict=True):
            self.x_adv[part] = piece["x_adv"]
            self.right[part] &= piece["right"].bool()
            self.seconds += float(piece["seconds"])
            self.passes += int(piece["passes"])

    def _clean(self, _: int) -> Piece:
        with repeatable(Generator(self.ctx.rng.device).manual_seed(self.ctx.seed)):
            clean_batches = batches(self.data, self.ctx)
            right = [retry_on_oom(partial(self._right, x, y, "clean")) for x, y in clean_batches]
        return {"right": torch.cat(right)}

    def _batch(self, index: Tensor, perturb: Perturb, on_pass: Callable[[], None]) -> Piece:
        """Attack a batch; `on_pass` is called at every pass, since one batch may take minutes."""
        device = self.ctx.rng.device
        settle(device)
        began = time.monotonic()
        part = self.data.take(index).to(device)
        x, y = part.unit(), part.y

        def attempt() -> tuple[Tensor, Tensor, int]:
            rng = Generator(device).manual_seed(self.ctx.seed)
            with repeatable(rng), counted(self.subject.model, on_pass) as passes:
                x_adv = perturb(x, y, rng).detach()
                check_bound(x, x_adv, self.ctx.threat, self.name)
                return x_adv, self._right(x_adv, y, "attacked"), sum(passes)

        x_adv, right, passes = retry_on_oom(attempt)
        settle(device)
        seconds = torch.tensor(time.monotonic() - began, dtype=torch.float64)
        spent = torch.tensor(passes, dtype=torch.int64)
        return {"x_adv": x_adv.cpu(), "right": right, "seconds": seconds, "passes": spent}

    def _right(self, x: Tensor, y: Tensor, which: str) -> Tensor:
        with torch.no_grad():
            logits = self.subject(x)
        if not logits.isfinite().all():
            raise NotFinite(f"the model's logits contain NaN or inf on {which} images")
        right: Tensor = logits.argmax(1) == y
        return right.to(torch.uint8).cpu()


@contextmanager
def counted(model: nn.Module, on_pass: Callable[[], None]) -> Iterator[list[int]]:
    """Count the images of each pass through a model; a pass with a gradient counts twice."""
    passes: list[int] = []

    def count(_: nn.Module, given: tuple[Any, ...]) -> None:
        on_pass()
        x = given[0]
        passes.append(len(x) * (2 if torch.is_grad_enabled() and x.requires_grad else 1))

    with model.register_forward_pre_hook(count):
        yield passes


@contextmanager
def repeatable(rng: Generator) -> Iterator[None]:
    """Let a model use torch's global generators, seeded from `rng`, and restore them afterwards."""
    with preserved_random_state(), seeded_random_state(rng):
        yield


@dataclass(frozen=True)
class AscentOnModel:
    """An attack on any loss, applied to a model's cross-entropy."""

    attack: Attack
    label: str
    everyone: bool = True

    def bind(self, subject: PixelModel, threat: Threat) -> Mapping[str, Perturb]:
        def perturb(x: Tensor, y: Tensor, rng: Generator) -> Tensor:
            loss = cross_entropy(subject, y)
            return self.attack.draw(subject, loss, x, rng, bounds=UNIT, radius_px=threat.radius_px)

        return {self.label: perturb}

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        return {"options": self.attack.model_dump(mode="json")}  # type: ignore[attr-defined]


def as_model_attack(attack: AnyAttack, name: str) -> ModelAttack:
    """The attack on the model: the attack itself, or its ascent of the cross-entropy."""
    if isinstance(attack, ModelAttack):
        return attack
    return AscentOnModel(attack, name)  # type: ignore[return-value]


def check_bound(x: Tensor, x_adv: Tensor, threat: Threat, name: str) -> dict[str, float]:
    """The largest perturbation per norm, in 1/255; MisfitError if it is outside the ball."""
    if x_adv.shape != x.shape:
        raise MisfitError(
            f"the attack {name} returned images {list(x_adv.shape)} for {list(x.shape)}; "
            "expected one for each"
        )
    delta = (x_adv - x).flatten(1)
    sizes = {
        "Linf": float(delta.abs().max()),
        "L2": float(delta.norm(dim=1).max()),
        "L1": float(delta.abs().sum(1).max()),
    }
    limit = threat.eps * (1 + SLACK) + SLACK * (1 if threat.norm != "L1" else delta.shape[1] ** 0.5)
    if not sizes[threat.norm] <= limit:
        raise MisfitError(
            f"the attack {name} left its ball: the largest {threat.norm} perturbation is "
            f"{sizes[threat.norm] * 255:.6g}/255, and the radius {threat.radius_px:g}/255. Its "
            f"figure would be wrong; report this to the author of the attack"
        )
    if not (x_adv.min() >= 0 and x_adv.max() <= 1):
        raise MisfitError(
            f"the attack {name} returned pixels from {float(x_adv.min()):.4g} to "
            f"{float(x_adv.max()):.4g}; expected [0, 1]"
        )
    return {norm: round(size * 255, 6) for norm, size in sizes.items()}


def _fingerprint(
    subject: PixelModel, attack: AnyAttack, data: Images, ctx: Context, name: str
) -> dict[str, Any]:
    """Everything on which a batch's result depends."""
    return {
        "attack": name,
        "options": attack.model_dump(mode="json"),  # type: ignore[union-attr]
        "threat": ctx.threat._asdict(),
        "seed": ctx.seed,
        "batch_size": ctx.batch_size,
        "images": tensors_hash(data._asdict()),
        **ctx.about_model(subject),
    }
