"""A model for evaluation and attacks: a module that takes [0, 1] images and returns logits."""

import hashlib
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from jemkit.data import Bounds
from jemkit.errors import DataError, MisfitError
from jemkit.models.energy import EnergyModel, LogitEnergy, Scores
from jemkit.models.networks import Adapted
from jemkit.runtime.modes import eval_mode
from jemkit.sampling.density import Density
from jemkit.sampling.init_dists import Start

UNIT = Bounds(0.0, 1.0)  # the range in which whatever judges a model sees images


class PixelModel(nn.Module):
    """A module that takes [0, 1] images and returns logits; the scaling is inside. With a density
    it can be sampled.

    `poll` is called before every pass, so that long work can be interrupted. The model gets its
    images in `dtype`, by default unchanged; scores are at least float32.
    """

    def __init__(
        self,
        model: EnergyModel,
        bounds: Bounds = Bounds(),
        density: Density | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model, self.bounds, self.dtype = model, bounds, dtype
        self.density_or_none = density
        self.poll: Callable[[], None] = _nothing

    def scores(self, pixels: Tensor) -> Scores:
        """Scores of images [B, C, H, W] in [0, 1], or of bytes in 0..255."""
        self.poll()
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255
        return self.scored(self.bounds.from_unit(pixels))

    def scored(self, x: Tensor) -> Scores:
        """The model's scores of images in its own range, at least float32."""
        x = x if self.dtype is None else x.to(self.dtype)
        parts = self.model(x)
        return Scores(*(z.to(torch.promote_types(z.dtype, torch.float32)) for z in parts))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.scores(pixels).logits

    def unchecked(self) -> "PixelModel":
        """The same model without checks of its images, for evaluation."""
        return self

    @property
    def has_density(self) -> bool:
        """Whether `sample` can draw images."""
        return self.density_or_none is not None

    @property
    def density(self) -> Density:
        """How images are drawn; MisfitError if the model is a classifier only."""
        if self.density_or_none is None:
            raise MisfitError("this model is a classifier without a density and cannot be sampled")
        return self.density_or_none

    def sample(
        self,
        n: int,
        rng: Generator,
        *,
        steps: int,
        start: Start | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """The final states of n newly started chains, [n, C, H, W] in [0, 1]; the buffer is not
        used."""
        p0 = self.density.start if start is None else start
        with self.model.register_forward_pre_hook(lambda *_: self.poll()):
            x = self.density.sample(self.model, n, rng, steps=steps, start=p0, y=y)
        return self.bounds.to_unit(self.bounds.clamp(x))


def _nothing() -> None:
    return None


def pixel_model(module: nn.Module, bounds: Bounds = UNIT) -> PixelModel:
    """A module as a PixelModel for evaluation; an energy model or any classifier of images.

    An energy model gets images in `bounds`, a classifier gets [0, 1] and normalises them itself.
    """
    if isinstance(module, PixelModel):
        return module.unchecked()
    if isinstance(module, EnergyModel):
        return PixelModel(module, bounds)
    return PixelModel(LogitEnergy(Adapted(module)), bounds)


def in_own_type(subject: PixelModel, pixels: Tensor) -> PixelModel:
    """The model with images of a type that it accepts: float32, else one of its weights'.

    MisfitError if it accepts none; other errors of a float32 model are passed on.
    """
    others = other_types(subject)
    if type(subject) is not PixelModel or not others:
        return subject
    reason = ""
    for dtype in [None, *others]:
        converted = PixelModel(subject.model, subject.bounds, subject.density_or_none, dtype)
        try:
            with torch.no_grad():
                converted(pixels)
        except (RuntimeError, TypeError) as error:
            reason = reason or str(error).splitlines()[0]
        else:
            return subject if dtype == subject.dtype else converted
    raise MisfitError(
        "the model takes images neither in float32 nor in the types of its weights, "
        f"{names_of(others)}: {reason}. Convert it to one type, model.float()"
    )


def names_of(types: list[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in types)


def other_types(subject: PixelModel) -> list[torch.dtype]:
    """The types of a model's weights and buffers beside float32."""
    weights = (*subject.model.parameters(), *subject.model.buffers())
    floats = [t.dtype for t in weights if t.is_floating_point()]
    return list(dict.fromkeys(dtype for dtype in floats if dtype != torch.float32))


def check_subject(subject: PixelModel, pixels: Tensor, n_classes: int) -> None:
    """Reject, before any attack, a model whose output is not logits of these classes."""
    with torch.no_grad():
        logits = subject(pixels)
    if logits.shape != (len(pixels), n_classes):
        folding = (
            ". If the second half are dummy classes, as in DUCAT, fold each with its class inside "
            "the model: an attack on all of them is misled by the dummies"
        )
        raise MisfitError(
            f"the model returned {list(logits.shape)} for {len(pixels)} images of {n_classes} "
            f"classes; expected logits [{len(pixels)}, {n_classes}]"
            f"{folding if logits.shape == (len(pixels), 2 * n_classes) else ''}"
        )
    if not logits.isfinite().all():
        raise DataError("the model's logits hold NaN or inf on clean images: it has diverged")


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's names and weights."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        for part in value if isinstance(value, tuple) else (value,):  # quantised: weight and bias
            digest.update(_raw(part))
    return digest.hexdigest()


def _raw(value: object) -> bytes:
    """The bytes of a tensor; what else a module keeps, such as a type, by its text."""
    if not isinstance(value, Tensor):
        return repr(value).encode()
    plain = value.detach().cpu()
    plain = plain.dequantize() if plain.is_quantized else plain
    return plain.contiguous().flatten().view(torch.uint8).numpy().tobytes()


class ZeroGradientModel(PixelModel):
    """The same model, with gradient 0 if it has none.

    Without it a gradient attack raises an error of autograd's; with it the attack does not move, as
    on any model without gradients.
    """

    def __init__(self, subject: PixelModel) -> None:
        super().__init__(subject.model, subject.bounds, subject.density_or_none, subject.dtype)
        self.poll = subject.poll

    def scores(self, pixels: Tensor) -> Scores:
        scores = super().scores(pixels)
        if not pixels.requires_grad:
            return scores
        none = 0 * pixels.flatten(1).sum(1)
        return Scores(scores.logits + none[:, None], scores.energy + none)


def with_gradient(subject: PixelModel, pixels: Tensor) -> PixelModel:
    """The model itself, or a ZeroGradientModel if no path leads from logits to pixels."""
    x = pixels.detach().clone().requires_grad_()
    with torch.enable_grad(), eval_mode(subject):  # in train mode batch norm would be updated
        logits = subject(x)
        if logits.requires_grad:
            (grad,) = torch.autograd.grad(logits.sum(), x, allow_unused=True)
            return subject if grad is not None else ZeroGradientModel(subject)
    return ZeroGradientModel(subject)
