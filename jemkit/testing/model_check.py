"""Checks of a trained model before its evaluation: its input, and measurements on few images."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from jemkit.attacks.pixel_model import PixelModel, ZeroGradientModel, weights_hash, with_gradient
from jemkit.config.eval_settings import settings_of, threat_of
from jemkit.data import Images
from jemkit.errors import DataError, JemkitError, MisfitError, memory_ran_out
from jemkit.evaluation.subjects import EvalTarget
from jemkit.evaluation.user_code import Normalised
from jemkit.metrics.figures import near_chance
from jemkit.metrics.outputs import probe_outputs
from jemkit.models.networks import Adapted
from jemkit.runtime.microbatch import MicroBatch
from jemkit.runtime.modes import eval_mode, frozen, preserved_random_state
from jemkit.runtime.precision import judging
from jemkit.runtime.rng import generator
from jemkit.sampling.init_dists import start_name
from jemkit.selection import stratified
from jemkit.testing.doctor import Check, State

MOST = 256  # test images on which accuracy is measured
FEW = 32  # images of the other checks
NEAR = 1e-3  # of the logits' size: differences that rounding explains
LEVELS = 255.0  # of a pixel's value
STEP_PX = 0.1  # of a step along the gradient, in 1/255


class Scaling(NamedTuple):
    """How pixels in [0, 1] become the network's input: (x - mean) / std, by channel."""

    mean: list[float]
    std: list[float]

    def __str__(self) -> str:
        if self == UNSCALED:
            return "none: the module gets images in [0, 1], and may scale them itself"
        mean, std = (", ".join(f"{v:.4g}" for v in values) for values in self)
        return f"(x - [{mean}]) / [{std}]"

    def units(self, px: float) -> list[float]:
        """A radius of so many 1/255, in the network's units."""
        return [px / LEVELS / value for value in self.std]


UNSCALED = Scaling([0.0], [1.0])
USUAL = {
    "[0, 1]": UNSCALED,
    "[-1, 1]": Scaling([0.5], [0.5]),
    "0..255": Scaling([0.0], [1 / LEVELS]),
    "ImageNet's mean and std": Scaling([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "CIFAR-10's mean and std": Scaling([0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]),
}
"""Inputs that networks are commonly trained on."""


class ModelReport(NamedTuple):
    """What is known of a model's input, and the checks."""

    input: dict[str, Any]
    checks: list[Check]


def check_model(target: EvalTarget, eps_px: float | None = None) -> ModelReport:
    """Check a model on some of its test images; a fault in it is a failed check, not an error.

    Raises ConfigError if `eps_px` is no radius.
    """
    threat = threat_of(settings_of({"eps_px": eps_px}), target.radius_px, target.test.x[0].numel())
    model, radius = target.model, threat.radius_px
    scaling = scaling_of(model)
    shape = list(target.test.x.shape[1:])
    about = {
        "shape": shape, "classes": target.n_classes, "range": [0.0, 1.0],
        "normalization": {"mean": scaling.mean, "std": scaling.std}, "radius_px": radius,
        "radius": radius / LEVELS, "radius_in_model_units": scaling.units(radius),
    }  # fmt: skip
    units = " or ".join(f"{v:.4g}" for v in dict.fromkeys(scaling.units(radius)))
    checks = [
        Check("input", "ok", f"images [B, {', '.join(map(str, shape))}], floats in [0, 1]", ""),
        Check("normalization", "ok", str(scaling), ""),
        Check(
            "radius", "ok",
            f"{radius:g}/255 in L-inf, {radius / LEVELS:.4g} of the pixel range: {units} in units "
            "of the network's input", "",
        ),
    ]  # fmt: skip
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with judging(device, threads=target.threads), eval_mode(model), MicroBatch().active():
        checks += _Examination(model, target, device).run()
    return ModelReport(about, checks)


def scaling_of(model: PixelModel) -> Scaling:
    """The preprocessing that is known, before the network."""
    outer = getattr(model.model.network, "module", None)
    if isinstance(outer, Normalised):
        mean, std = (outer.get_buffer(name).flatten().tolist() for name in ("mean", "std"))
        return UNSCALED if {*mean} == {0.0} and {*std} == {1.0} else Scaling(mean, std)
    low, high = model.bounds
    return Scaling([-low / (high - low)], [1 / (high - low)])


class _Examination:
    """The checks of one model, in order; later ones need that earlier ones passed."""

    def __init__(self, model: PixelModel, target: EvalTarget, device: torch.device) -> None:
        self.model, self.target, self.device = model, target, device
        part = target.test.take(stratified(target.test.y, MOST)).to(device)
        self.images, self.labels = part.unit(), part.y
        few = part.take(stratified(part.y, FEW).to(device))
        self.few: Images = few
        self.x, self.y = few.unit(), few.y

    def run(self) -> Iterator[Check]:
        yield self._guarded("weights", self._weights)
        first = self._guarded("logits", self._logits)
        yield first
        if first.state == "fail":
            return
        with preserved_random_state():
            for name, check in (
                ("eval mode", self._still), ("determinism", self._deterministic),
                ("batch", self._rows), ("corners", self._corners), ("outputs", self._outputs),
                ("gradient", self._gradient), ("slope", self._slope),
                ("accuracy", self._accuracy), ("sampling", self._sampling),
            ):  # fmt: skip
                yield self._guarded(name, check)

    def _guarded(self, name: str, check: Callable[[], tuple[State, str, str]]) -> Check:
        try:
            return Check(name, *check())
        except Exception as error:  # a user's module may raise anything
            if memory_ran_out(error):
                raise
            text = " ".join(str(error).split())[:300]
            kind = "" if isinstance(error, JemkitError) else f"{type(error).__name__}: "
            return Check(name, "fail", f"{kind}{text}", "")

    def _pass(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(x)  # type: ignore[no-any-return]

    def _weights(self) -> tuple[State, str, str]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        count = sum(p.numel() for p in self.model.parameters())
        types = sorted({str(t.dtype).removeprefix("torch.") for t in self.model.parameters()})
        about = f"{count:,} parameters of {', '.join(types) or 'no type'}"
        if all(t.isfinite().all() for t in tensors if t.is_floating_point()):
            return "ok", f"{about}, all finite", ""
        return "fail", f"{about}; some are NaN or inf", "the model has diverged: use other weights"

    def _logits(self) -> tuple[State, str, str]:
        z, k = self._pass(self.x), self.target.n_classes
        if z.shape != (len(self.x), k):
            came, wanted = list(z.shape), [len(self.x), k]
            return "fail", f"{came} for {len(self.x)} images", f"return logits {wanted}"
        if not z.isfinite().all():
            return "fail", "NaN or inf on test images", "the model has diverged"
        low, high = float(z.min()), float(z.max())
        return "ok", f"[B, {k}], from {low:.4g} to {high:.4g} on {len(self.x)} test images", ""

    def _still(self) -> tuple[State, str, str]:
        before = weights_hash(self.model)
        self._pass(self.x)
        if weights_hash(self.model) != before:
            text = "a pass in eval mode changes weights or buffers"
            return "fail", text, "update them in train mode only (self.training)"
        return "ok", "a pass in eval mode changes neither weights nor buffers", ""

    def _deterministic(self) -> tuple[State, str, str]:
        gap = float((self._pass(self.x) - self._pass(self.x)).abs().max())
        if gap:
            advice = "attack it by eot; figures depend on the noise"
            return "fail", f"two passes in eval mode differ by up to {gap:.3g}", advice
        return "ok", "two passes in eval mode are equal, bit for bit", ""

    def _rows(self) -> tuple[State, str, str]:
        z = self._pass(self.x)
        alone = torch.cat([self._pass(row[None]) for row in self.x[:4]])
        turned = self._pass(self.x.flip(0)).flip(0)
        gap = max(float((alone - z[:4]).abs().max()), float((turned - z).abs().max()))
        text = f"an image's logits, alone and in a batch, differ by {gap:.2g}"
        if gap > NEAR * max(1.0, float(z.abs().max())):
            return "fail", text, "normalise by running statistics in eval mode, not by the batch"
        return "ok", text, ""

    def _corners(self) -> tuple[State, str, str]:
        shape, rng = self.x.shape[1:], generator(self.device, 0, "corners")
        random = torch.rand((FEW, *shape), generator=rng, device=self.device).round()
        ends = [torch.full((1, *shape), v, device=self.device) for v in (0.0, 1.0)]
        with torch.no_grad():
            scores = self.model.scores(torch.cat([*ends, random]))
        if all(part.isfinite().all() for part in scores):
            return "ok", "logits and E(x) are finite for images of 0 and 1 alone", ""
        return "fail", "NaN or inf for images of 0 and 1 alone", "an attack reaches such images"

    def _outputs(self) -> tuple[State, str, str]:
        outputs = probe_outputs(self.model, self.few, self.device)
        row = outputs.finding
        if outputs.bounded:
            return "fail", row["found"], row["do"]
        return "ok", "neither probabilities nor bounded", ""

    def _gradient(self) -> tuple[State, str, str]:
        if isinstance(with_gradient(self.model, self.x[:2]), ZeroGradientModel):
            text = "no gradient leads from the logits to the pixels"
            return "fail", text, "remove no_grad, detach or numpy from the forward pass"
        grad = self._ascent(lambda z: F.cross_entropy(z, self.y, reduction="sum"))
        if not grad.isfinite().all():
            return "fail", "the gradient of the cross-entropy has NaN or inf", "fix its operations"
        size = grad.flatten(1).abs().amax(1)
        dead = int((size < torch.finfo(size.dtype).tiny).sum())
        text = f"{len(size) - dead} of {len(size)} images have a gradient of the cross-entropy"
        if dead > len(size) / 4:
            return "fail", text, "the logits are too large for the loss, or the path is cut"
        return "ok", f"{text}, of {float(size.median()):.2g} at its largest pixel (median)", ""

    def _ascent(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of a loss of the logits, to the images."""
        x = self.x.clone().requires_grad_()
        with torch.enable_grad(), frozen(self.model):
            (grad,) = torch.autograd.grad(loss(self.model(x)), x)
        return grad

    def _slope(self) -> tuple[State, str, str]:
        """Whether the logits change along the gradient as the gradient says."""

        def margin(z: Tensor) -> Tensor:
            rival = z.masked_fill(F.one_hot(first, z.shape[1]).bool(), -torch.inf).amax(1)
            return rival - z.gather(1, first[:, None])[:, 0]

        first = self._pass(self.x).argmax(1)
        if isinstance(self.model, ZeroGradientModel):
            return "warn", "not measured, without a gradient", ""
        grad = self._ascent(lambda z: margin(z).sum())
        step = STEP_PX / LEVELS
        after = margin(self._pass(self.x + step * grad.sign()))
        before = margin(self._pass(self.x - step * grad.sign()))
        wanted = 2 * step * grad.flatten(1).abs().sum(1)
        ratio = float(((after - before) / wanted.clamp(min=1e-12)).median())
        text = f"along the gradient the logits change by {ratio:.2f} of what it says (median)"
        if not 0.5 < ratio < 2:
            advice = "the gradient is not the outputs': attack also by square and bpda"
            return "warn", text, advice
        return "ok", text, ""

    def _accuracy(self) -> tuple[State, str, str]:
        k, own = self.target.n_classes, self._share(self.model)
        text = f"{own:.1%} of {len(self.labels)} test images"
        name, best = max(self._others(), key=lambda pair: pair[1], default=("", 0.0))
        if best > own + 0.1:
            advice = f"the module may expect {name}: see --mean and --std"
            text += f"; with images scaled to {name} {best:.1%}"
            return "fail" if near_chance(own, k) else "warn", text, advice
        if near_chance(own, k):
            chance = f", close to chance for {k} classes"
            return "fail", f"{text}{chance}", "check weights, preprocessing and the data set"
        return "ok", text, ""

    def _share(self, model: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            return float((model(self.images).argmax(1) == self.labels).float().mean())

    def _others(self) -> Iterator[tuple[str, float]]:
        """The accuracy of a user's module on images of other usual ranges."""
        network = self.model.model.network
        outer = network.module if isinstance(network, Adapted) else None
        if not isinstance(outer, Normalised) or self.model.dtype is not None:
            return
        for name, scaling in USUAL.items():
            channels = self.images.shape[1]
            if scaling != scaling_of(self.model) and len(scaling.mean) in (1, channels):
                other = Normalised(outer.module, scaling.mean, scaling.std).to(self.device)
                with eval_mode(other):
                    yield name, self._share(other)

    def _sampling(self) -> tuple[State, str, str]:
        if not self.model.has_density:
            return "ok", "none: a classifier without a density", ""
        density = self.model.density
        start, sampler = start_name(density.start), type(density.sampler).__name__
        rng: Generator = generator(self.device, 0, "check")
        try:
            x = self.model.sample(2, rng, steps=1)
        except (DataError, MisfitError) as error:
            return "warn", str(error), ""
        if x.isfinite().all() and x.min() >= 0 and x.max() <= 1:
            return "ok", f"{sampler} from {start}: a step stays finite and in [0, 1]", ""
        return "fail", f"{sampler} from {start}: a step leaves [0, 1] or is not finite", ""
