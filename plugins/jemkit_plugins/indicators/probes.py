"""The passes on which the indicators are based, run once for a model and a threat."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from jemkit.sampling.kernels import perturbed
from jemkit.attacks.autoattack import Stage, squares_fit
from jemkit.attacks.base import Threat
from jemkit.attacks.pixel_model import UNIT, PixelModel
from jemkit.data import Images
from jemkit.metrics.evaluator import Context, batches
from jemkit_plugins.indicators.ascent import Ascent, ascend, cross_entropy, lost_margin, surrogate
from jemkit_plugins.indicators.plan import (
    BOX_STEPS,
    PGD_STEPS,
    STUDENT_BATCH,
    STUDENT_STEPS,
    Plan,
    planned,
)
from jemkit.runtime.rng import generator
from jemkit.selection import by_class, stratified

QUICK_IMAGES = 32
STUDENT_IMAGES = 1000
BOX = Threat("Linf", 255.0)


@dataclass
class Probes:
    """Results on n correctly classified images; None if a probe was not run."""

    index: Tensor  # [n], their indices in the data
    examined: int  # images that were classified to find them
    plan: Plan
    repeat: float | None = None  # largest change of a logit in a second pass, over their spread
    company: Tensor | None = None  # [m], the same in a batch with other images or in another order
    dead: Tensor | None = None  # [n], no gradient at x nor at a random start
    saturated: Tensor | None = None  # [n], a cross-entropy of exactly 0
    search: Tensor | None = None  # [n], wrong under random search
    pgd: Tensor | None = None  # [n], wrong under PGD-20 on the cross-entropy; not defined in L1
    margin: Tensor | None = None  # [n], the same on the margin, which does not saturate
    restarts: Tensor | None = None  # [n], wrong under any of the restarts of PGD-20
    box: Tensor | None = None  # [n], right under PGD that may set every pixel to any value
    transfer: Tensor | None = None  # [n], wrong under a transfer attack from a surrogate
    agreement: float = 0.0  # share of images on which the surrogate agrees with the model
    radius: dict[float, Tensor] = field(default_factory=dict)  # [n], right, by radius_px
    steps: dict[int, Tensor] = field(default_factory=dict)  # [n], right at the last state, by steps

    @property
    def n(self) -> int:
        return len(self.index)

    def felled(self, wrong: Tensor) -> Tensor:
        """These images [n] and all that an ascent within the radius fools."""
        for more in (self.pgd, self.margin, self.restarts):
            wrong = wrong if more is None else wrong | more
        return wrong


def probe(
    subject: PixelModel, data: Images, ctx: Context, n_images: int, budget: int | None = None
) -> Probes | None:
    """The probes within a budget of passes, on correct images stratified by class; else None."""
    n_images = min(n_images, QUICK_IMAGES) if ctx.quick else n_images
    plan = planned(
        min(n_images, len(data.y)),
        quick=ctx.quick,
        ascents=ctx.threat.norm != "L1",
        search=squares_fit(data.x.shape[2], data.x.shape[3], ctx.threat.norm),
        batch_size=ctx.batch_size,
        budget=budget,
    )
    index, examined = _right(subject, data, ctx, plan.images)
    if not len(index):
        return None
    return _Prober(subject, data, ctx, index, examined, plan).run()


def _right(subject: PixelModel, data: Images, ctx: Context, n: int) -> tuple[Tensor, int]:
    """The indices of n correct images, stratified by class.

    Also returns how many images were classified to find them.
    """
    order, known = by_class(data.y), ctx.notes.rows.get("clean")
    if known is None or len(known) != len(order):
        known = _clean(subject, data.take(order), ctx, n, order)
    places = known[order].nonzero().squeeze(1)[:n]
    examined = int(places[-1]) + 1 if len(places) == n else len(order)
    return order[places].sort().values, examined


def _clean(subject: PixelModel, data: Images, ctx: Context, n: int, order: Tensor) -> Tensor:
    """Which images are correct, [N] by index; False for images after the n-th one found."""
    right = torch.zeros(len(order), dtype=torch.bool)
    at = 0
    with torch.no_grad():
        for x, y in batches(data, ctx):
            right[order[at : at + len(y)]] = (subject(x).argmax(1) == y).cpu()
            at += len(y)
            if int(right.sum()) >= n:
                break
    return right


class _Prober:
    """One run of the probes, with its own generator from the seed."""

    def __init__(
        self,
        subject: PixelModel,
        data: Images,
        ctx: Context,
        index: Tensor,
        examined: int,
        plan: Plan,
    ) -> None:
        device = ctx.rng.device
        self.subject, self.data, self.ctx, self.examined = subject, data, ctx, examined
        self.index, self.device, self.plan = index, device, plan
        part = data.take(index).to(device)
        self.x, self.y = part.unit(), part.y
        self.rng: Generator = generator(device, ctx.seed, "indicators")
        ticks = {"radius": len(plan.sizes.radii) - 1, "restarts": plan.sizes.restarts - 1}
        self.done, self.total = 0, sum(ticks.get(name, 1) for name in plan.names)

    def run(self) -> Probes:
        probes, runs = Probes(self.index, self.examined, self.plan), self.plan.names
        if "logits" in runs:
            probes.repeat, probes.company = self._logits()
        if "gradient" in runs:
            probes.dead, probes.saturated = self._gradients()
        if "search" in runs:
            probes.search = self._fools(self._search)
        if "pgd" in runs:
            self._climb(probes)
        self._tick(self.total)
        return probes

    def _search(self, x: Tensor, y: Tensor) -> Tensor:
        square = Stage("square", steps=self.plan.sizes.queries)
        return square.bind(self.subject, self.ctx.threat)(x, y, self.rng)

    def _logits(self) -> tuple[float, Tensor]:
        """The logits of one batch twice, then with half of it replaced, then in reverse order."""
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
        """Which images have no gradient of the cross-entropy, and which saturate it."""
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

    def _climb(self, probes: Probes) -> None:
        """Run every planned ascent."""
        threat, sizes, runs = self.ctx.threat, self.plan.sizes, self.plan.names
        for share in sizes.radii if "radius" in runs else (1.0,):
            radius_px = threat.radius_px * share
            wrong = self._ascend(Threat(threat.norm, radius_px)).wrong
            probes.radius[radius_px] = ~wrong
            probes.pgd = wrong if share == 1 else probes.pgd
        if "restarts" in runs and probes.pgd is not None:
            probes.restarts = probes.pgd.clone()
            for _ in range(sizes.restarts - 1):
                probes.restarts |= self._ascend(threat).wrong
        if "steps" in runs:
            trail = self._ascend(threat, steps=max(sizes.steps)).trail
            probes.steps = {k: ~trail[k] for k in sizes.steps}
        if "margin" in runs:
            probes.margin = self._ascend(threat, loss=lost_margin).wrong
        if "box" in runs:
            probes.box = self._box()
        if "transfer" in runs:
            probes.transfer, probes.agreement = self._transfer()

    def _box(self) -> Tensor:
        start = Threat("Linf", min(self.ctx.threat.radius_px, 8.0))
        step = BOX.radius_px / 20
        return ~self._ascend(BOX, steps=BOX_STEPS, step_px=step, start=start).wrong

    def _transfer(self) -> tuple[Tensor, float]:
        """Adversarial images of a surrogate, applied to the model."""
        some = self.data.take(stratified(self.data.y, STUDENT_IMAGES))
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
        """Which images the model misclassifies after an attack."""
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
