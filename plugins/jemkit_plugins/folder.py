"""Folders of image files as a data set."""

import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from jemkit.data import SIZES, Augmentation, Dataset, Images, Split, checked
from jemkit.errors import DataError
from jemkit.hookspecs import hookimpl
from jemkit.options import Options
from jemkit.splits import stratified_parts
from jemkit.vision import torchvision

Sample = tuple[str, int]  # an image file and its label


class Folder(Options):
    """Image files in a folder a class: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/*."""

    radius_px: ClassVar[float] = 8
    augmentation: ClassVar[Augmentation] = Augmentation()  # nobody knows what a flip means here

    dir: Path
    size: int | None = Field(None, ge=SIZES[0], le=SIZES[1])  # px: the centre square, resized

    @property
    def n_classes(self) -> int:
        return len(_classes(self.dir))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class folders' names."""
        return tuple(_classes(self.dir))

    def files(self, split: Split) -> tuple[str, ...]:
        """The image files of a split below `dir`, in the order of its images."""
        return tuple(
            Path(path).relative_to(self.dir).as_posix() for path, _ in _samples(self.dir)[split]
        )

    def load(self, split: Split) -> Images:
        """All images of a split; grey where all of both are. Float pixels are taken as [0, 1]."""
        samples = _samples(self.dir)
        grey = _survey([path for part in samples.values() for path, _ in part], self.size)
        x = [_pixels(path, grey=grey, size=self.size) for path, _ in samples[split]]
        if any(image.is_floating_point() for image in x):
            x = [image if image.is_floating_point() else image / 255 for image in x]
        y = torch.tensor([label for _, label in samples[split]])
        return checked(Images(torch.stack(x), y), self.n_classes, f"{split} images in {self.dir}")


@hookimpl
def jemkit_datasets() -> Mapping[str, type[Dataset]]:
    return {"folder": Folder}


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))


def _classes(root: Path) -> list[str]:
    """The class folders by name; train and test hold the same ones."""
    train, test = _folders(root / "train"), _folders(root / "test")
    if train != test:
        only = {"train": set(train) - set(test), "test": set(test) - set(train)}
        told = "; ".join(f"only {k} has {', '.join(sorted(v))}" for k, v in only.items() if v)
        raise DataError(f"{root}: train and test want the same class folders, but {told}")
    classes = train or _folders(root)
    if len(classes) < 2:
        raise DataError(
            f"{root}: wanted two class folders or more, in it or in its train and test, "
            f"got {len(classes)}; give --data-dir DIR where they are"
        )
    return classes


def _samples(root: Path) -> dict[Split, list[Sample]]:
    """The image files of each split; where the folders set no test images apart, a fifth is."""
    classes = _classes(root)
    if _folders(root / "train"):
        return {"train": _listed(root / "train", classes), "test": _listed(root / "test", classes)}
    samples = _listed(root, classes)
    label, fewest = Counter(label for _, label in samples).most_common()[-1]
    if fewest < 5:
        raise DataError(
            f"{root}: {classes[label]} has {fewest} images, wanted 5 of each class to set a fifth "
            "apart for testing; add images, or sort them into train and test folders"
        )
    parts = stratified_parts(torch.tensor([label for _, label in samples]), test_size=0.2)
    return {split: [samples[i] for i in index.tolist()] for split, index in parts.items()}


def _listed(root: Path, classes: list[str]) -> list[Sample]:
    folder = torchvision().datasets.folder
    index = {name: label for label, name in enumerate(classes)}
    try:
        found: list[Sample] = folder.make_dataset(str(root), index, folder.IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise DataError(f"{root}: {error}. Put images there, or remove the folder") from error
    return found


def _survey(paths: list[str], size: int | None) -> bool:
    """Whether all images are grey, from their headers; refuses those that do not fit together."""
    grey, first = True, (paths[0], (0, 0))
    for path in paths:
        with _opened(path) as image:
            mode, came = image.mode, image.size
        if mode.startswith("I"):
            raise DataError(f"{path}: pixels of mode {mode}; wanted 8 bits, or floats in [0, 1]")
        first = (path, came) if path == paths[0] else first
        if size is None and (came != first[1] or came[0] != came[1]):
            raise DataError(
                f"{path} is {came[0]} x {came[1]} px, {first[0]} is {first[1][0]} x {first[1][1]}; "
                "wanted squares of one size: --set data.size=32 resizes all to 32 x 32"
            )
        grey = grey and mode in ("L", "F")
    return grey


def _pixels(path: str, *, grey: bool, size: int | None) -> Tensor:
    """One image, [C, H, W], uint8 or float32 in [0, 1]."""
    with _opened(path) as opened:
        mode = "F" if opened.mode == "F" else "L" if grey else "RGB"
        image = opened.convert(mode)
    if mode == "F":
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN passes neither
            raise DataError(f"{path}: float pixels outside [0, 1], NaN or inf")
    if size is not None:
        image = _centre(image).resize((size, size), Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.array(image))
    x = x.permute(2, 0, 1) if x.ndim == 3 else x.unsqueeze(0)
    return (x.clamp(0, 1) if mode == "F" else x).expand(1 if grey else 3, -1, -1)


def _centre(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (
        OSError,
        EOFError,
        SyntaxError,
        ValueError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error
