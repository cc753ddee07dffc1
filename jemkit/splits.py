"""Splits: which images train, validate and test, the same for every run."""

from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from jemkit.data import Dataset, Images, OffersValidation, Split, checked
from jemkit.errors import ConfigError


class Splits:
    """A data set's training, validation and test images; each is read when first asked for.

    Validation is a fixed part of the training split, the same for every run: chosen class by class
    with a generator of its own, so that runs and data orders of any seed can be compared. A data
    set's own validation images stand in place of that part.
    """

    def __init__(
        self, dataset: Dataset, *, valid_fraction: float = 0.1, max_train: int | None = None
    ) -> None:
        self.dataset, self.valid_fraction, self.max_train = dataset, valid_fraction, max_train
        self._kept: dict[str, Images] = {}

    def images(self, split: Literal["train", "valid", "test"]) -> Images:
        if split not in self._kept:
            if split == "test":
                self._kept["test"] = self._checked(self.dataset.load("test"), "test")
            else:
                self._divide()
        return self._kept[split]

    def _divide(self) -> None:
        whole = self._checked(self.dataset.load("train"), "training")
        index = shuffled_by_class(whole.y, self.dataset.n_classes)
        if self.max_train is not None:
            index = index[: self.max_train]
        own = self.dataset.validation() if isinstance(self.dataset, OffersValidation) else None
        if own is not None:
            self._kept["valid"] = self._checked(own, "validation")
            self._kept["train"] = whole.take(index.sort().values)
            return
        n_valid = round(len(index) * self.valid_fraction)
        if not 0 < n_valid < len(index):
            raise ConfigError(
                f"{len(index)} images with a validation share of {self.valid_fraction} leave "
                f"{n_valid} to validate and {len(index) - n_valid} to train on; both must be some"
            )
        self._kept["valid"] = whole.take(index[:n_valid])
        self._kept["train"] = whole.take(index[n_valid:].sort().values)

    def _checked(self, images: Images, what: str) -> Images:
        source = f"the {what} images of {type(self.dataset).__name__}"
        return checked(images, self.dataset.n_classes, source)


def shuffled_by_class(y: Tensor, n_classes: int) -> Tensor:
    """A fixed order of all indices in which every beginning holds the classes in proportion."""
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
