"""Devices, precision and determinism: what a method never learns of."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, nn

from jemkit.backbone import Backbone
from jemkit.errors import ConfigError
from jemkit.objective import Batch, Objective, Remembering, Terms

Precision = Literal["fp32", "tf32", "bf16"]

Layout = Literal["auto", "measure", "yes", "no"]
"""Of weights, channels last or not: `auto` is a rule, which repeats; `measure` is what is faster
when it is asked."""


def device_of(name: str) -> torch.device:
    """auto is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here; use cpu or auto")
    return torch.device(name)


Around = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Within:
    """An objective whose phases run inside contexts, entered anew each time."""

    inner: Objective[Any]
    drawing: Around
    losing: Around = nullcontext

    @property
    def needs_density(self) -> bool:
        return self.inner.needs_density

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Any:
        with self.drawing():
            return self.inner.draw(backbone, batch, rng)

    def loss(self, backbone: Backbone, batch: Batch, draws: Any) -> Terms:
        with self.losing():
            return self.inner.loss(backbone, batch, draws)

    def after(self, backbone: Backbone, batch: Batch, draws: Any, rng: Generator) -> None:
        if isinstance(self.inner, Remembering):
            self.inner.after(backbone, batch, draws, rng)

    def parameters(self) -> list[nn.Parameter]:
        return self.inner.parameters() if isinstance(self.inner, Remembering) else []

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict() if isinstance(self.inner, Remembering) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self.inner, Remembering):
            self.inner.load_state_dict(state)


def in_bf16(objective: Objective[Any], device_type: str) -> Within:
    """An objective whose passes run in bfloat16; energies and losses stay float32.

    Autocast is entered anew for every pass, since it keeps casts of weights that SAM moves.
    """
    autocast = partial(torch.autocast, device_type, torch.bfloat16)
    return Within(objective, autocast, autocast)


@contextmanager
def numerics(
    *, precision: Precision = "fp32", deterministic: bool = False, threads: int | None = None
) -> Iterator[None]:
    """Torch's switches for a run, put back as they were found."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    strict, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = not deterministic
    _be_deterministic(deterministic)
    found = torch.get_num_threads()
    torch.set_num_threads(threads or found)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = conv
        torch.backends.cudnn.benchmark = benchmark
        _be_deterministic(strict)
        torch.set_num_threads(found)


def _be_deterministic(on: bool) -> None:
    """Torch's switch, left alone where it stands so: to touch it imports the whole compiler."""
    if torch.are_deterministic_algorithms_enabled() != on:
        torch.use_deterministic_algorithms(on)
