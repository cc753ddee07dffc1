"""The passes that indicators judge by, run once for a model and a threat."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from jemkit.attack import Threat, perturbed
from jemkit.blackbox import random_search
from jemkit.data import Images
from jemkit.evaluator import Context, batches
from jemkit.indicators.ascent import Ascent, ascend, cross_entropy, lost_margin, surrogate
from jemkit.pixels import UNIT, PixelModel
from jemkit.seeds import generator

PGD_STEPS, RESTARTS, QUERIES = 20, 5, 300
RADII = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
STEPS = (1, 5, 20, 50)
QUICK_IMAGES, QUICK_QUERIES, QUICK_RADII, QUICK_STEPS = 32, 100, (0.5, 1.0, 2.0), (1, 5, 20)
STUDENT_IMAGES, STUDENT_STEPS, STUDENT_BATCH = 1000, 200, 128
BOX_STEPS = 50
BOX = Threat("Linf", 255.0)


@dataclass(frozen=True)
class Climbs:
    """What gradient ascents and a surrogate do to the images; each [n]."""

    pgd: Tensor  # wrong under PGD-20 on the cross-entropy
    margin: Tensor  # the same on the margin, which does not saturate
    restarts: Tensor  # wrong under any of the restarts of PGD-20
    n_restarts: int
    radius: dict[float, Tensor]  # right, by radius_px
    steps: dict[int, Tensor]  # right at the last state, by steps
    box: Tensor  # right under PGD that may change every pixel to anything
    transfer: Tensor  # wrong under what fools the surrogate
    agreement: float  # of the surrogate with the model on the images

    @property
    def felled(self) -> Tensor:
        """By any ascent within the radius."""
        return self.pgd | self.margin | self.restarts


@dataclass(frozen=True)
class Probes:
    """What was found on n images that the model has right."""

    index: Tensor  # [n], their places in the data
    seen: int  # images looked through for them
    repeat: float  # largest change of a logit in a second pass, as a share of their spread
    company: Tensor  # [m], the same for images beside other images or in another place
    dead: Tensor  # [n], no gradient at x nor at a random start
    saturated: Tensor  # [n], a cross-entropy of exactly 0
    search: Tensor  # [n], wrong under random search
    queries: int
    climbs: Climbs | None  # None in L1, where PGD has no step

    @property
    def n(self) -> int:
        return len(self.index)


def probe(subject: PixelModel, data: Images, ctx: Context, n_images: int) -> Probes | None:
    """Every probe on the first images that are right; None where none is."""
    n_images = min(n_images, QUICK_IMAGES) if ctx.quick else n_images
    index, seen = _right(subject, data, ctx, n_images)
    if not len(index):
        return None
    return _Prober(subject, data, ctx, index, seen).run()


def _right(subject: PixelModel, data: Images, ctx: Context, n: int) -> tuple[Tensor, int]:
    """The places of the first n images that are right, and how many were looked through."""
    found: list[int] = []
    at = 0
    with torch.no_grad():
        for x, y in batches(data, ctx):
            for right in (subject(x).argmax(1) == y).tolist():
                found += [at] if right else []
                at += 1
                if len(found) == n:
                    return torch.tensor(found), at
    return torch.tensor(found, dtype=torch.int64), at


class _Prober:
    """One course of probes, with a generator of its own from the seed."""

    def __init__(
        self, subject: PixelModel, data: Images, ctx: Context, index: Tensor, seen: int
    ) -> None:
        device = ctx.rng.device
        self.subject, self.data, self.ctx, self.seen = subject, data, ctx, seen
        self.index, self.device = index, device
        part = data.take(index).to(device)
        self.x, self.y = part.unit(), part.y
        self.rng: Generator = generator(device, ctx.seed, "indicators")
        self.radii = QUICK_RADII if ctx.quick else RADII
        self.done, self.total = 0, len(self.radii) + 9

    def run(self) -> Probes:
        repeat, company = self._logits()
        dead, saturated = self._gradients()
        queries = QUICK_QUERIES if self.ctx.quick else QUERIES
        search = self._fools(lambda x, y: self._search(x, y, queries))
        climbs = None if self.ctx.threat.norm == "L1" else self._climbs()
        self._tick(self.total)
        return Probes(
            self.index, self.seen, repeat, company, dead, saturated, search, queries, climbs
        )

    def _search(self, x: Tensor, y: Tensor, queries: int) -> Tensor:
        return random_search(self.subject, x, y, self.ctx.threat, self.rng, queries)

    def _logits(self) -> tuple[float, Tensor]:
        """Of one batch twice, then with half of it replaced, then backwards."""
        self._tick()
        x = self.x[: self.ctx.batch_size]
        half = (len(x) + 1) // 2
        with torch.no_grad():
            first, again = self.subject(x), self.subject(x)
            beside = self.subject(torch.cat([x[:half], 1 - x[half:]]))[:half]
            back = self.subject(x.flip(0)).flip(0)[:half]
        scale = max(float(first.std(correction=0)), 1e-3 * float(first.abs().max()), 1e-12)
        moved = torch.stack([(other - first[:half]).abs().amax(1) for other in (beside, back)])
        return float((again - first).abs().max()) / scale, (moved.amax(0) / scale).cpu()

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """Which images give the cross-entropy no gradient, and which saturate it."""
        self._tick()
        sizes, losses = [], []
        for x, y in self._parts():
            start = UNIT.clamp(perturbed(x, min(self.ctx.threat.eps, 0.1), self.rng))
            for at in (x, start):
                z = at.detach().clone().requires_grad_()
                with torch.enable_grad():
                    loss = cross_entropy(self.subject(z), y)
                    (grad,) = torch.autograd.grad(loss.sum(), z)
                sizes.append(grad.flatten(1).abs().amax(1).cpu())
                losses.append(loss.detach().cpu())
        size = torch.maximum(torch.cat(sizes[::2]), torch.cat(sizes[1::2]))
        return size < torch.finfo(size.dtype).tiny, torch.cat(losses[::2]) == 0

    def _climbs(self) -> Climbs:
        threat, steps = self.ctx.threat, QUICK_STEPS if self.ctx.quick else STEPS
        radius, pgd = {}, None
        for share in self.radii:
            wrong = self._ascend(Threat(threat.norm, threat.radius_px * share)).trail.any(0)
            radius[threat.radius_px * share] = ~wrong
            pgd = wrong if share == 1 else pgd
        if pgd is None:
            raise ValueError("the radii of the probes hold the threat's own")
        restarts, n_restarts = pgd.clone(), 3 if self.ctx.quick else RESTARTS
        for _ in range(n_restarts - 1):
            restarts |= self._ascend(threat).wrong
        trail = self._ascend(threat, steps=max(steps)).trail
        margin = self._ascend(threat, loss=lost_margin).wrong
        box = ~self._ascend(BOX, steps=BOX_STEPS, step_px=BOX.radius_px / 20,
                            start=Threat("Linf", min(threat.radius_px, 8.0))).wrong  # fmt: skip
        transfer, agreement = self._transfer()
        return Climbs(
            pgd, margin, restarts, n_restarts, radius, {k: ~trail[k] for k in steps}, box,
            transfer, agreement,
        )  # fmt: skip

    def _transfer(self) -> tuple[Tensor, float]:
        """What fools a surrogate of the model, tried on the model itself."""
        some = self.data.take(torch.arange(min(len(self.data.y), STUDENT_IMAGES)))
        student = surrogate(
            self.subject, some.to(self.device).unit(), self.ctx.threat, self.rng,
            steps=STUDENT_STEPS, batch=min(STUDENT_BATCH, self.ctx.batch_size),
        )  # fmt: skip
        with torch.no_grad():
            agreement = float((student(self.x).argmax(1) == self.y).float().mean())

        def fool(x: Tensor, y: Tensor) -> Tensor:
            return ascend(
                student, x, y, self.ctx.threat, self.rng, steps=PGD_STEPS, loss=lost_margin
            ).end

        return self._fools(fool), agreement

    def _fools(self, attack: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Which images the model has wrong after an attack."""
        self._tick()
        wrong = []
        for x, y in self._parts():
            with torch.no_grad():
                wrong.append((self.subject(attack(x, y)).argmax(1) != y).cpu())
        return torch.cat(wrong)

    def _ascend(self, threat: Threat, steps: int = PGD_STEPS, **settings: object) -> Ascent:
        self._tick()
        parts = [
            ascend(self.subject, x, y, threat, self.rng, steps=steps, **settings)  # type: ignore[arg-type]
            for x, y in self._parts()
        ]
        trail = torch.cat([part.trail.cpu() for part in parts], dim=1)
        return Ascent(trail, torch.cat([part.end.cpu() for part in parts]))

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        size = self.ctx.batch_size
        return list(zip(torch.split(self.x, size), torch.split(self.y, size), strict=True))

    def _tick(self, done: int | None = None) -> None:
        self.ctx.poll()
        self.done = min(self.done + 1, self.total) if done is None else done
        self.ctx.progress("indicators", self.done, self.total)
