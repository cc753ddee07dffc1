"""Splits: the training, validation and test images, the same for every run."""

from typing import Literal, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from jemkit.data import Dataset, Images, OffersValidation, Split, checked
from jemkit.errors import ConfigError, DataError

Part = Literal["train", "valid", "test"]


class Pinned(Protocol):
    """Checks that a run's images are those at its start."""

    def check_classes(self, dataset: Dataset) -> None:
        """Raise DataError where the data set has other classes."""

    def check_images(self, splits: "Splits", split: Part, images: Images) -> None:
        """Raise DataError where the split holds other images."""


class Splits:
    """A data set's training, validation and test images; each is read when first used.

    Validation is a fixed, stratified part of the training split, the same for every run whatever
    its seed, so that runs can be compared. A data set's own validation images replace that part. A
    split that `pinned` rejects is not returned.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        valid_fraction: float = 0.1,
        max_train: int | None = None,
        pinned: Pinned | None = None,
    ) -> None:
        self.dataset, self.valid_fraction, self.max_train = dataset, valid_fraction, max_train
        self.pinned = pinned
        self.own_validation = False
        self._read_parts: dict[Part, Images] = {}
        self._rows: dict[Part, list[int]] = {}  # of the data set's own split

    def images(self, split: Part) -> Images:
        """All images of a split, with labels; read once."""
        if split not in self._read_parts:
            if self.pinned is not None:
                self.pinned.check_classes(self.dataset)
            loaded = self._read(split)
            if self.pinned is not None:
                for part, images in loaded.items():
                    self.pinned.check_images(self, part, images)
            self._read_parts |= loaded
        return self._read_parts[split]

    def rows(self, split: Part) -> list[int]:
        """The indices of these images in the data set's own split."""
        if split not in self._rows:
            self.images(split)
        return self._rows[split]

    def _read(self, split: Part) -> dict[Part, Images]:
        if split == "test":
            test = self._checked(self.dataset.load("test"), "test")
            self._rows["test"] = list(range(len(test.y)))
            return {"test": test}
        try:
            return self._divide()
        except ConfigError as error:
            if self.pinned is None:
                raise
            raise DataError(f"the training images changed since the run began: {error}") from None

    def _divide(self) -> dict[Part, Images]:
        whole = self._checked(self.dataset.load("train"), "training")
        index = shuffled_by_class(whole.y, self.dataset.n_classes)
        if self.max_train is not None:
            index = index[: self.max_train]
        own = self.dataset.validation() if isinstance(self.dataset, OffersValidation) else None
        self.own_validation = own is not None
        if own is not None:
            own = self._checked(own, "validation")
            order = shuffled_by_class(own.y, self.dataset.n_classes)
            return self._parted(whole, index, own.take(order), order)
        n_valid = round(len(index) * self.valid_fraction)
        if not 0 < n_valid < len(index):
            raise ConfigError(
                f"{len(index)} images with a validation share of {self.valid_fraction} leave "
                f"{n_valid} to validate and {len(index) - n_valid} to train on; both must be some"
            )
        order = index[:n_valid]
        return self._parted(whole, index[n_valid:], whole.take(order), order)

    def _parted(
        self, whole: Images, index: Tensor, valid: Images, order: Tensor
    ) -> dict[Part, Images]:
        """Both parts, and their indices; every prefix of the validation images is stratified."""
        rows = index.sort().values
        self._rows |= {"train": rows.tolist(), "valid": order.tolist()}
        return {"train": whole.take(rows), "valid": valid}

    def _checked(self, images: Images, what: str) -> Images:
        source = f"the {what} images of {type(self.dataset).__name__}"
        return checked(images, self.dataset.n_classes, source)


def shuffled_by_class(y: Tensor, n_classes: int) -> Tensor:
    """A fixed order of all indices of which every prefix is stratified by class."""
    order = torch.randperm(len(y), generator=Generator().manual_seed(0))
    rank = torch.zeros(len(y))
    for label in range(n_classes):
        members = order[y[order] == label]
        rank[members] = (torch.arange(len(members)) + 0.5) / max(1, len(members))
    return order[rank[order].argsort(stable=True)]


def stratified_parts(y: Tensor, *, test_size: float) -> dict[Split, Tensor]:
    """The fixed stratified split: the indices of each part, the same on every call."""
    from sklearn.model_selection import train_test_split

    index = np.arange(len(y))
    train, test = train_test_split(index, test_size=test_size, stratify=y.numpy(), random_state=0)
    return {"train": torch.from_numpy(train), "test": torch.from_numpy(test)}
