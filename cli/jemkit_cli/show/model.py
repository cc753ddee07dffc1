"""The model that `jemkit show` shows, opened as an evaluation opens it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from jemkit.attacks.pixel_model import PixelModel
from jemkit.config.registry import Registry
from jemkit.data import Images, Shape
from jemkit.errors import DataError, Preempted
from jemkit.runtime.modes import sampling_mode
from jemkit.runtime.rng import generator
from jemkit.training.opened import Which, open_model
from jemkit.training.pinned import SAMPLED
from jemkit.training.restore import Restored, restored


class ShownModel:
    """A model with what the page says of it.

    Several tabs of a browser share it: `working` is entered for each computation, one at a time.
    """

    def __init__(
        self,
        model: PixelModel,
        shape: Shape,
        n_classes: int,
        *,
        radius_px: float = 8.0,
        classes: tuple[str, ...] = (),
        test: Images | None = None,
        untested: str = "",
        about: dict[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        self.model, self.shape, self.radius_px = model, shape, radius_px
        self.classes = classes or tuple(map(str, range(n_classes)))
        self.test, self.untested = test, untested  # untested: why there are no test images
        self.about, self.threads = about or {}, threads
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._lock, self._ended = threading.Lock(), threading.Event()
        model.model.register_forward_pre_hook(lambda *_: self._poll())

    @property
    def unsampled(self) -> str:
        """Why the model has no chains; empty if it has."""
        if self.model.has_density:
            return ""
        return (
            "This model is a classifier without a density: it has no chain that could generate or "
            "purify an image. Train jem, jempp, mebm or sadajem."
        )

    @contextmanager
    def working(self) -> Iterator[None]:
        """The model to oneself, with frozen weights and in eval mode."""
        with self._lock, sampling_mode(self.model, "running_stats"):
            yield

    def generator(self, seed: int, purpose: str) -> Generator:
        return generator(self.device, seed, "show", purpose)

    def end(self) -> None:
        """Interrupt what is being computed."""
        self._ended.set()

    def _poll(self) -> None:
        if self._ended.is_set():
            raise Preempted("the page is closed")


def shown_model(
    path: Path,
    registry: Registry,
    device: torch.device,
    *,
    which: Which = "best",
    dataset: dict[str, Any] | None = None,
) -> ShownModel:
    """The run, checkpoint or exported model at `path`; `dataset` is where its data are now.

    Where the data are missing the model is shown without test images.
    """
    opened = open_model(path, which)
    run = restored(
        opened, registry, device, dataset, advice=SAMPLED, same_data=True, without_images=True
    )
    test, untested = _test_images(run)
    names = run.pin.table.classes if run.pin is not None else None
    use = {kind: run.tables[kind]["use"] for kind in ("backbone", "objective", "data")}
    return ShownModel(
        PixelModel(run.backbone.model, run.task.bounds, run.backbone.density_or_none),
        run.task.shape,
        run.task.n_classes,
        radius_px=run.task.radius_px,
        classes=names or (),
        test=test,
        untested=untested,
        about={**opened.about, **use, "seed": run.recipe.run.seed},
        threads=run.recipe.run.threads,
    )


def _test_images(run: Restored) -> tuple[Images | None, str]:
    try:
        return run.splits.images("test"), ""
    except DataError as error:
        return None, str(error)
