"""A joint energy-based model as a classifier of scikit-learn."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from jemkit.attacks.pixel_model import PixelModel
from jemkit.config.recipe import Resolved, resolve
from jemkit.config.registry import installed
from jemkit.data import Augmentation, Images, Split
from jemkit.models.energy import Scores
from jemkit.options import SIZES
from jemkit.runtime.precision import as_trained
from jemkit.runtime.rng import generator
from jemkit.runtime.run_dir import RunFolder
from jemkit.training.build import load_model
from jemkit.training.opened import read_checkpoint
from jemkit.training.trainer import Trainer

Array = NDArray[Any]
CHUNK = 256  # rows of a forward pass; a smaller last one is filled up, so that rows do not change


class JEMClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier with a density: p(y | x), and log p(x) up to a constant.

    X is an array of vectors (n, d), or of square images (n, h, w), (n, 1, h, w) or (n, 3, h, w) of
    8 to 64 pixels. Vectors of at most 4096 features are laid out as an image, the rest of which is
    constant.

    Parameters
    ----------
    backbone, objective, network : str
        Parts of jemkit by name. None as a network: "mlp" for vectors, "smallcnn" for images.
    epochs, batch_size : int
        Length of the training. The weights of the epoch with the best accuracy on the validation
        images are kept: under PGD-10, or clean where the objective does not train with attacks.
    learning_rate : float or None
        The largest one; None: that of the recipe.
    valid_fraction : float
        Share of X, between 0 and 1, that is not trained on, but used to choose the epoch; at
        least one row.
    data_range : (float, float) or None
        The values that are black and white. None: 0 and 255 of bytes; otherwise the smallest and
        largest value of X, of each feature of vectors.
    settings : mapping or None
        Any other options by dotted key, as `--set` takes them: {"backbone.steps": 40}. The defaults
        are those of jemkit's recipe for the digits.
    device : "auto", "cpu" or "cuda"
    random_state : int, RandomState or None
        Seed of weights, batches and chains.

    Attributes
    ----------
    classes_ : the labels, sorted
    n_features_in_ : the size of the second axis of X
    model_ : the trained torch module, which maps images in [0, 1] to logits
    history_ : accuracies on the validation images, by epoch
    best_epoch_ : the epoch whose weights are kept
    """

    def __init__(
        self,
        *,
        backbone: str = "jem",
        objective: str = "jem",
        network: str | None = None,
        epochs: int = 50,
        batch_size: int = 32,
        learning_rate: float | None = None,
        valid_fraction: float = 0.1,
        data_range: tuple[float, float] | None = None,
        settings: Mapping[str, Any] | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        random_state: int | RandomState | None = None,
    ) -> None:
        self.backbone = backbone
        self.objective = objective
        self.network = network
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.valid_fraction = valid_fraction
        self.data_range = data_range
        self.settings = settings
        self.device = device
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train from scratch on X with labels y of any type.

        Raises ValueError for arrays that do not fit, ConfigError for parameters.
        """
        checked: tuple[Array, Array] = validate_data(
            self, X, y, allow_nd=True, ensure_min_samples=2
        )
        rows, targets = checked
        check_classification_targets(targets)
        self.classes_, labels = np.unique(targets, return_inverse=True)
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"valid_fraction = {self.valid_fraction}: expected one in (0, 1)")
        if len(self.classes_) < 2:
            raise ValueError(f"the data have 1 class, {self.classes_[0]!r}; expected 2 or more")
        self._layout = Layout.of(rows, self.data_range)
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        pixels = torch.from_numpy(self._layout.pixels(rows)).clamp(0, 1)
        data = _Arrays(Images(pixels, torch.from_numpy(labels)), len(self.classes_))
        with TemporaryDirectory(prefix="jemkit-") as place:
            trainer = Trainer(self._resolved(data), RunFolder.create(Path(place) / "run"))
            trainer.run()
            best = read_checkpoint(trainer.folder.path, trainer.folder.checkpoints / "best")
            load_model(trainer.backbone.model, best.weights)
        trained = trainer.backbone
        self.model_ = PixelModel(trained.model, trained.bounds, trained.density_or_none).eval()
        self.history_, self.best_epoch_ = trainer.history, int(trainer.best["epoch"])
        return self

    def predict(self, X: ArrayLike) -> Array:
        """The most likely label of each row."""
        logits = self._scores(X).logits
        chosen: Array = self.classes_[logits.argmax(1).numpy()]
        return chosen

    def predict_proba(self, X: ArrayLike) -> Array:
        """p(y | x), (n, n_classes), in the order of `classes_`."""
        proba: Array = self._scores(X).logits.double().softmax(1).numpy()
        return proba

    def predict_log_proba(self, X: ArrayLike) -> Array:
        """log p(y | x)."""
        logs: Array = self._scores(X).logits.double().log_softmax(1).numpy()
        return logs

    def decision_function(self, X: ArrayLike) -> Array:
        """Logits, (n, n_classes); of two classes their difference, (n,)."""
        logits = self._scores(X).logits.double().numpy()
        values: Array = logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits
        return values

    def score_samples(self, X: ArrayLike) -> Array:
        """-E(x), (n,): the log-density of each row up to a constant of the model.

        Differences between rows are differences of log-densities; the values of two models cannot
        be compared.
        """
        density: Array = -self._scores(X).energy.double().numpy()
        return density

    def sample(self, n_samples: int = 1, *, steps: int | None = None) -> Array:
        """Rows (n_samples, ...) in the range of X: the final states of new chains of the density.

        `steps` is the length of a chain, 40 by default. The same `random_state` gives the same
        rows. Raises MisfitError for a backbone without a density.
        """
        check_is_fitted(self)
        device = next(self.model_.parameters()).device
        rng = generator(device, self._seed, "samples")
        pixels = self.model_.sample(n_samples, rng, steps=40 if steps is None else steps)
        return self._layout.rows(pixels.cpu().numpy())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.target_tags.required = True
        return tags

    def _resolved(self, data: "_Arrays") -> Resolved:
        """The recipe: that of the digits with these parameters, on these data."""
        n = len(data.images.y)
        network = self.network or ("mlp" if self._layout.size else "smallcnn")
        run = {
            "epochs": self.epochs, "batch_size": self.batch_size, "device": self.device,
            "seed": self._seed, "valid_fraction": min(max(self.valid_fraction, 1 / n), 1 - 1 / n),
        }  # fmt: skip
        own: dict[str, Any] = {
            "data": {"use": "digits"}, "backbone": {"use": self.backbone}, "run": run,
            "objective": {"use": self.objective},
        }  # fmt: skip
        if network:
            own["backbone"]["network"] = {"use": network}
        if self.learning_rate is not None:
            own["optimizer"] = {"lr": self.learning_rate}
        sets = [f"{key}={_toml(value)}" for key, value in (self.settings or {}).items()]
        resolved = resolve(installed(), config=own, overrides=sets)
        return resolved._replace(recipe=resolved.recipe.model_copy(update={"data": data}))

    def _scores(self, X: ArrayLike) -> Scores:
        """Logits and energies of rows, in passes of equal size."""
        check_is_fitted(self)
        rows: Array = validate_data(self, X, allow_nd=True, reset=False)
        pixels = torch.from_numpy(self._layout.pixels(rows))
        device, parts = next(self.model_.parameters()).device, []
        with torch.no_grad(), as_trained(device.type, "fp32", deterministic=False, threads=None):
            for chunk in torch.split(pixels, CHUNK):
                fill = chunk.new_zeros((CHUNK - len(chunk), *chunk.shape[1:]))
                scores = self.model_.scores(torch.cat([chunk, fill]).to(device))
                parts.append(Scores(*(part[: len(chunk)].cpu() for part in scores)))
        return Scores(torch.cat([s.logits for s in parts]), torch.cat([s.energy for s in parts]))


@dataclass(frozen=True)
class Layout:
    """How rows of X become images in [0, 1]."""

    shape: tuple[int, ...]  # of a row
    size: int  # features of a vector; 0: rows are images
    image: tuple[int, int, int]
    low: Array
    high: Array

    @classmethod
    def of(cls, X: Array, given: tuple[float, float] | None) -> "Layout":
        size = X.shape[1] if X.ndim == 2 else 0
        side = max(SIZES[0], math.ceil(math.sqrt(size))) if size else X.shape[-1]
        image = (X.shape[1] if X.ndim == 4 else 1, side if size else X.shape[-2], side)
        if X.ndim > 4 or image[0] not in (1, 3) or image[1] != side:
            raise ValueError(
                f"got X of shape {X.shape}: expected vectors (n, d), or square images (n, h, w), "
                "(n, 1, h, w) or (n, 3, h, w)"
            )
        if not SIZES[0] <= side <= SIZES[1]:
            what = f"{size} features" if size else f"images of {side} pixels"
            most = f"{SIZES[1] ** 2} features" if size else f"{SIZES[0]} to {SIZES[1]} pixels"
            raise ValueError(f"got {what}; expected {'at most ' if size else ''}{most}")
        return cls(X.shape[1:], size, image, *_range(X, given))

    def pixels(self, X: Array) -> NDArray[np.float32]:
        """Images [n, C, H, W]; the places without a feature are mid-grey."""
        if X.shape[1:] != self.shape:
            raise ValueError(
                f"got rows of shape {X.shape[1:]}; {JEMClassifier.__name__} was fitted with "
                f"{self.shape}"
            )
        unit = (X.astype(np.float64) - self.low) / (self.high - self.low)
        if self.size:
            rest = math.prod(self.image) - self.size
            unit = np.pad(unit, ((0, 0), (0, rest)), constant_values=0.5)
        images: NDArray[np.float32] = unit.reshape(len(X), *self.image).astype(np.float32)
        return images

    def rows(self, pixels: Array) -> Array:
        """Images as rows of X."""
        flat = pixels.reshape(len(pixels), -1)[:, : self.size or None]
        rows: Array = self.low + (self.high - self.low) * flat.reshape(-1, *self.shape)
        return rows


def _range(X: Array, given: tuple[float, float] | None) -> tuple[Array, Array]:
    """The values of black and white, one for all or one for each feature."""
    if given is not None:
        low, high = (np.asarray(float(value)) for value in given)
        if not low < high:
            raise ValueError(f"data_range = {given}: expected a smaller and a larger number")
        return low, high
    if X.dtype == np.uint8:
        return np.asarray(0.0), np.asarray(255.0)
    axis = 0 if X.ndim == 2 else None
    low, high = X.min(axis).astype(np.float64), X.max(axis).astype(np.float64)
    return low, np.where(high > low, high, low + 1)  # a constant feature is black


class _Arrays:
    """A data set of arrays, as a recipe has it."""

    radius_px = 25.5
    augmentation = Augmentation()

    def __init__(self, images: Images, n_classes: int) -> None:
        self.images, self.n_classes = images, n_classes

    def load(self, split: Split) -> Images:
        """The training split; no other is read."""
        return self.images


def _toml(value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str([*value]) if isinstance(value, tuple) else str(value)
